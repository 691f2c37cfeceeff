"""Recognise a run directory, and remove the files of a refused run."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from azrecipe.distributed import local_storage
from azrecipe.errors import CommandError
from azrecipe.runs import event_log
from azrecipe.utils.atomic_files import read_json

LOCK_NAME = ".lock"
# A run writes these before the files that identify a run directory.
FIRST_FILES = {LOCK_NAME, "recipe.yaml", "parent.json"}
# These hold no results: they may be removed.
BOOKKEEPING_FILES = {*FIRST_FILES, "environment.json", "status.json", event_log.EVENT_LOG_NAME, "plan.json", "phases.json"}
RESULT_NAMES = {
    "checkpoints", "phases", "candidates", "models", "adapter", "final", "metrics.jsonl", "bad_batches.jsonl", "result.json", "report.html", "stacks",
}  # fmt: skip
_COMMON_NAMES = {"checkpoints", "candidates", "models", "adapter", "final"}  # other programs have such folders, too
# In a complete checkpoint, and in the part of one that a machine other than the first has
CHECKPOINT_FILES = ("checkpoint-*/COMPLETE.json", "checkpoint-*/rng_state_[0-9]*.pth")
RUN_STATES = ("running", "complete", "failed", "interrupted")  # of status.json
RUN_ID = re.compile(r"[0-9a-f]{32}")


def check_run_folder(path: Path) -> None:
    """Raise CommandError for a folder that holds other files or links.

    The folder itself may be a link, as a run may lie on another disk. Changes nothing.
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
    for link in _iter_links(path):
        raise CommandError(
            f"{link}: a link inside a run directory. What it points to could be overwritten or deleted.\n"
            f"  Put the files themselves there, or make the whole of {path} a link"
        )


def check_pipeline_folder(path: Path) -> None:
    """Raise CommandError for a folder that is not a pipeline's."""
    check_run_folder(path)
    if (path / "status.json").exists():
        raise CommandError(f"{path}: this folder holds the run of a recipe, not a pipeline. Give the pipeline another name or project")


def _holds_run(path: Path) -> bool:
    """Whether a folder is empty or a run wrote it."""
    names = {entry.name for entry in os.scandir(path) if not _is_temporary(entry.name)}
    if not names or (_is_empty_file(path / LOCK_NAME) and names <= FIRST_FILES):  # the run was killed right after its start
        return True
    if local_storage.storage_is_local() and all(
        name in BOOKKEEPING_FILES | RESULT_NAMES or name.endswith((".sagemaker-uploading", ".sagemaker-uploaded")) for name in names
    ):
        # Files are uploaded one by one: those that identify a run may be missing, but not all that only a run writes.
        return bool(names - _COMMON_NAMES) or any(file for pattern in CHECKPOINT_FILES for file in (path / "checkpoints").rglob(pattern))
    return any(
        (_is_status(_read_mapping(path / "status.json")), _is_environment(_read_mapping(path / "environment.json")), _holds_pipeline(path))
    )


def _holds_pipeline(path: Path) -> bool:
    """Check whether a folder is a pipeline's: its steps.json lists runs."""
    steps = _read_mapping(path / "steps.json").get("steps")
    return isinstance(steps, list) and all(isinstance(step, dict) and {"step", "cell", "run"} <= step.keys() for step in steps)


def _is_status(status: dict[str, Any]) -> bool:
    """Check that a status.json is a run's, not another program's."""
    return status.get("state") in RUN_STATES and bool(RUN_ID.fullmatch(str(status.get("run_id"))))


def _is_environment(environment: dict[str, Any]) -> bool:
    return {"azrecipe", "python", "versions"} <= environment.keys()


def _is_empty_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink() and file.stat().st_size == 0


def _is_temporary(name: str) -> bool:
    """Whether write_text left this file beside one that it was replacing."""
    known = "|".join(re.escape(each) for each in sorted(BOOKKEEPING_FILES | RESULT_NAMES | {"steps.json"}))
    return re.fullmatch(rf"\.({known})\.\d+\.tmp", name) is not None


def _read_mapping(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    It is empty where the file is missing or holds something else.
    """
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _iter_links(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        yield from (link for name in sorted((*folders, *files)) if (link := Path(folder, name)).is_symlink())


def remove_bookkeeping(path: Path, keep_folder: bool) -> bool:
    """Remove the files of a refused run, if it wrote no results.

    Files of other names are results or belong to the user: if there is one, nothing is removed. Returns whether the files
    were removed.
    """
    folders = []
    for folder, _, files in os.walk(path, topdown=False):
        has_other_files = any(Path(folder) != path or (name not in BOOKKEEPING_FILES and not _is_temporary(name)) for name in files)
        if has_other_files or any(_iter_links(Path(folder))):
            return False
        folders.append(Path(folder))
    for file in list(path.iterdir()):
        if file.is_file():
            file.unlink()
    for subfolder in folders:
        if subfolder != path or not (keep_folder or path.is_symlink()):
            with contextlib.suppress(OSError):  # somebody has just put a file there
                subfolder.rmdir()
    return True
