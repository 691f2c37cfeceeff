"""The process group: started once, and checked to see the same files."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from azrecipe.distributed import local_storage
from azrecipe.errors import CannotRun


def share(path: Path, text: str) -> None:
    """Check that every process of a run sees the main one's file, as shared storage must. Raises CannotRun; a collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    said = [text]
    dist.broadcast_object_list(said, src=0)
    seen = path.exists() and said[0] in path.read_text(encoding="utf-8")
    if not seen:
        raise CannotRun(
            f"process {dist.get_rank()} does not see {path}: give a --runs-dir on storage that all machines share.\n"
            f"  Where each has its own, uploaded in the background to one place that is copied to all before a restart: {local_storage.SWITCH}=local"
        )


def start_group() -> Any:
    """Start the process group, once; returns Accelerate's PartialState.

    The timeout covers what the main process does alone while the others wait: merging, saving, syncing to slow disks.
    """
    from accelerate import PartialState

    several = "WORLD_SIZE" in os.environ
    return PartialState(timeout=timedelta(hours=2)) if several else PartialState()
