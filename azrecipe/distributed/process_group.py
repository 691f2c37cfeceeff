"""Start the process group and check that it shares files."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from azrecipe.errors import CannotRun
from azrecipe.utils import environment_variables


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

    The timeout covers the work of the main process while the others wait: merging, saving, syncing to slow disks.
    """
    from accelerate import PartialState

    is_distributed = "WORLD_SIZE" in os.environ
    return PartialState(timeout=timedelta(hours=2)) if is_distributed else PartialState()
