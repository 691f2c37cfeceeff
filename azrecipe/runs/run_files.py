"""The files of a run directory: whose a folder is, and which of its files a run may remove."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from azrecipe.distributed import local_storage
from azrecipe.errors import CommandError
from azrecipe.runs import event_log
from azrecipe.utils.atomic_files import read_json

LOCK = ".lock"
FIRST = {LOCK, "recipe.yaml", "parent.json"}  # what a run writes before the files that prove that the folder is a run's
NOTES = {
    *FIRST,
    "environment.json",
    "status.json",
    event_log.NAME,
    "plan.json",
    "phases.json",
}  # no result of computing that would be missed
RESULTS = {
    "checkpoints",
    "phases",
    "candidates",
    "models",
    "adapter",
    "final",
    "metrics.jsonl",
    "bad_batches.jsonl",
    "result.json",
    "report.html",
}
STATES = ("running", "complete", "failed", "interrupted")  # of status.json


def check_folder(path: Path) -> None:
    """Refuse a folder that is not empty and holds no run, and links inside one. Touches nothing.

    The folder itself may be a link: a run may lie on another disk. Raises CommandError.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise CommandError(f"{path}: a file or a broken link is in the place of the run directory. Give the recipe another name or project")
    if not _holds_run(path):
        raise CommandError(
            f"{path}: this folder is not empty and holds no run of azrecipe, so nothing is written there.\n"
            "  Give the recipe another name or project, or another --runs-dir"
        )
    for link in _links(path):
        raise CommandError(
            f"{link}: a link inside a run directory. What it points to could be overwritten or deleted.\n"
            f"  Put the files themselves there, or make the whole of {path} a link"
        )


def _holds_run(path: Path) -> bool:
    """Whether a folder is empty or a run wrote it."""
    names = {entry.name for entry in os.scandir(path) if not _temporary(entry.name)}
    if not names or (LOCK in names and names <= FIRST):  # killed right after its start
        return True
    if local_storage.apart() and all(
        name in NOTES | RESULTS or name.endswith((".sagemaker-uploading", ".sagemaker-uploaded")) for name in names
    ):
        return True  # uploaded file by file: those that prove it may be missing
    proofs = (("environment.json", "azrecipe"), ("steps.json", "steps"))
    return _mapping(path / "status.json").get("state") in STATES or any(key in _mapping(path / name) for name, key in proofs)


def _temporary(name: str) -> bool:
    """Whether write_text made a file of this name beside the file that it replaces."""
    return name.startswith(".") and name.endswith(".tmp")


def _mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where the file is missing or is something else."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _links(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        yield from (link for name in sorted((*folders, *files)) if (link := Path(folder, name)).is_symlink())


def remove_notes(path: Path, keep_folder: bool) -> bool:
    """Remove what a refused run wrote, if it wrote notes only. Returns whether it did; otherwise nothing was touched.

    Files of another name are the user's or results: with one of them there, everything stays.
    """
    folders = []
    for folder, _, files in os.walk(path, topdown=False):
        if any(Path(folder) != path or (name not in NOTES and not _temporary(name)) for name in files) or any(_links(Path(folder))):
            return False
        folders.append(Path(folder))
    for file in list(path.iterdir()):
        if file.is_file():
            file.unlink()
    for each in folders:
        if each != path or not (keep_folder or path.is_symlink()):
            with contextlib.suppress(OSError):  # somebody has put a file there in this moment
                each.rmdir()
    return True
