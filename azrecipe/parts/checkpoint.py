"""Checkpoints that are complete or not there: a marker written last, and the newest whole one found again."""

from __future__ import annotations

import shutil
from pathlib import Path

from azrecipe.parts.files import read_json, sync_tree, write_json

MARKER = "COMPLETE.json"


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name (checkpoint-120)."""
    return int(folder.name.rsplit("-", 1)[1])


def seal(folder: Path) -> None:
    """Sync a written checkpoint to disk and mark it complete; only then does `last_complete` see it."""
    sizes = sync_tree(folder)
    write_json(folder / MARKER, sizes)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its marker and every file in the size that the marker gives."""
    try:
        sizes = read_json(folder / MARKER)
    except ValueError:
        return False
    return sizes is not None and all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted((c for c in folder.glob("checkpoint-*") if is_complete(c)), key=step_of)


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def remove_torn(folder: Path) -> None:
    """Delete what a crash left half-written, so that it is never mistaken for a checkpoint."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not is_complete(checkpoint):
            shutil.rmtree(checkpoint)


def rotate(folder: Path, keep: int) -> None:
    """Delete the oldest complete checkpoints beyond `keep`. The marker goes first, so a crash leaves none that looks whole."""
    for old in complete(folder)[:-keep]:
        (old / MARKER).unlink()
        shutil.rmtree(old)
