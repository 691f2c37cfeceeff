"""Start the process group and check that it shares files."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from azrecipe.distributed import meeting
from azrecipe.errors import CannotRun
from azrecipe.utils import environment_variables
from azrecipe.utils.process_watch import STACKS_FOLDER

LONG_TIMEOUT_SECONDS = 7200.0
_checkpoint_groups: list[Any] = []  # at most one, for all phases of a run


def check_shared_storage(path: Path, text: str) -> None:
    """Check that every process sees the main process' file.

    Args:
        path: The file.
        text: What the file contains; the main process' value counts.

    Raises:
        CannotRun: This process does not see the file. A collective.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    if not path.exists() or texts[0] not in path.read_text(encoding="utf-8"):
        raise CannotRun(
            f"process {dist.get_rank()} does not see {path}: give a --runs-dir on storage that all machines share.\n"
            f"  Where each has its own, uploaded in the background to one place that is copied to all before a restart: {environment_variables.STORAGE}=local"
        )


def start_process_group() -> Any:
    """Start the process group once; return Accelerate's PartialState.

    The timeout covers the work of the main process while the others wait: merging, saving, syncing to slow disks. It does not cover
    the wait for processes to come (AZRECIPE_START_TIMEOUT).

    Raises:
        RunFailed: A process has ended, or did not come.
        CannotRun: The launch's store cannot be reached.
    """
    import torch.distributed as dist
    from accelerate import PartialState

    is_distributed = "WORLD_SIZE" in os.environ
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        meeting.meet_processes()
    return PartialState(timeout=timedelta(seconds=LONG_TIMEOUT_SECONDS)) if is_distributed else PartialState()


def get_checkpoint_group() -> Any:
    """Return the group of threads that write checkpoints. A collective at first.

    It is gloo's, as a thread's operations on NCCL would mix with those of training. It keeps the long timeout: disks are slow.
    """
    import torch.distributed as dist

    if not _checkpoint_groups:
        timeout = timedelta(seconds=LONG_TIMEOUT_SECONDS)
        _checkpoint_groups.append(dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoints"))
    return _checkpoint_groups[0]


def announce_failure(message: str) -> None:
    """Tell the other processes that this one ends, before they have met.

    Afterwards they notice it by themselves.
    """
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        meeting.announce_failure(message)


def set_timeout(seconds: float) -> None:
    """Set how long collective operations may take from now on.

    Operations that have begun keep their timeout, and so does the group that writes checkpoints. Without a process group nothing happens.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if group in _checkpoint_groups:
            continue
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def record_collectives(run_path: Path) -> None:
    """Let NCCL's flight recorder write into a run directory at a timeout.

    Call it before the process group starts. A user's own settings stay.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_path / STACKS_FOLDER / "nccl-rank-"))
