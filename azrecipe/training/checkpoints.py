"""Write, find, check and delete checkpoints.

A marker file is written last. A checkpoint without it is incomplete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CannotRun, CommandError
from azrecipe.utils.atomic_files import list_file_sizes, read_json, sync_tree, write_json

MARKER = "COMPLETE.json"
NAME = re.compile(r"checkpoint-\d+")
BACKEND_FILE = "backend.json"


def list_folders(folder: Path) -> list[Path]:
    """List the checkpoint-<step> folders. A copy by another name is the user's."""
    return [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]


def get_step(folder: Path) -> int:
    """Get the optimizer step from a checkpoint folder's name (checkpoint-120)."""
    return int(folder.name.rsplit("-", 1)[1])


def finalize(folder: Path, backend: Backend, remote_sizes: Mapping[str, int] | None = None) -> None:
    """Sync a written checkpoint to disk and mark it complete.

    Only then does `find_last_complete` find it. `remote_sizes` has the sizes of its files on other machines, if each has its own folder.
    """
    write_marker(folder, {**(remote_sizes or {}), **sync_checkpoint(folder, backend)})


def sync_checkpoint(folder: Path, backend: Backend) -> dict[str, int]:
    """Sync this machine's files of a checkpoint to disk; return their sizes."""
    if backend.main:
        write_json(folder / BACKEND_FILE, {"kind": backend.strategy, "processes": backend.world_size, "format": _get_fsdp_format(backend)})
    return sync_tree(folder)


def write_marker(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write the marker, last, with the sizes of all files."""
    write_json(folder / MARKER, sizes)


def is_complete(folder: Path) -> bool:
    """Tell whether a checkpoint has its marker and every file.

    Each file must have the size that the marker says.
    """
    try:
        sizes = _read_marker(folder)
        return sizes is not None and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def _read_marker(folder: Path) -> dict[str, int] | None:
    """Read the sizes in a checkpoint's marker; None without a valid one."""
    try:
        sizes: dict[str, int] | None = read_json(folder / MARKER)
    except ValueError:
        return None
    return sizes


def list_complete(folder: Path) -> list[Path]:
    """List the complete checkpoints in a folder, oldest first."""
    return sorted((path for path in list_folders(folder) if is_complete(path)), key=get_step)


def find_last_complete(folder: Path) -> Path | None:
    """Find the newest complete checkpoint, or None."""
    return next(reversed(list_complete(folder)), None)


class CommonCheckpoint(NamedTuple):
    """The checkpoint that all processes resume from, and a warning or ""."""

    path: Path | None
    warning: str


def find_latest_common(folder: Path) -> CommonCheckpoint:
    """Find the newest checkpoint that is complete for every process.

    This is a collective call.

    Returns:
        The checkpoint, or None, and a warning where some processes have a newer one that others lack.

    Raises:
        CannotRun: No checkpoint is complete for all, but one is complete for all machines together. Nothing is deleted.
    """
    steps_by_process = local_storage.all_gather_object([get_step(path) for path in list_complete(folder)])
    common, all_steps = set(steps_by_process[0]).intersection(*steps_by_process), set().union(*steps_by_process)
    newest = folder / f"checkpoint-{max(common)}" if common else None
    if local_storage.storage_is_local() and not common and (scattered := _list_scattered(folder)):
        raise CannotRun(
            f"{folder}/checkpoint-{scattered[-1]} is complete on all machines together and not on each: the uploaded files were not copied to every machine.\n"
            f"  Copy it to every machine first, or remove {folder} on all of them: this training then starts again"
        )
    if not all_steps or max(all_steps) in common:
        return CommonCheckpoint(newest, "")
    ranks = ", ".join(str(rank) for rank, steps in enumerate(steps_by_process) if max(all_steps) not in steps)
    start = newest.name if newest else "the start, as no checkpoint is complete for all"
    return CommonCheckpoint(newest, f"checkpoint-{max(all_steps)} is incomplete for process {ranks}: going on from {start}")


def _list_scattered(folder: Path) -> list[int]:
    """List the steps whose checkpoints are complete across machines.

    This is a collective call.
    """
    files_by_process = local_storage.all_gather_object(
        {get_step(path): (_read_marker(path), list_file_sizes(path)) for path in list_folders(folder)}
    )
    steps = []
    for step in sorted(set().union(*files_by_process)):
        shares = [checkpoints[step] for checkpoints in files_by_process if step in checkpoints]
        marker = next((sizes for sizes, _ in shares if sizes is not None), None)
        files = {name: size for _, sizes in shares for name, size in sizes.items()}
        if marker is not None and all(files.get(name) == size for name, size in marker.items()):
            steps.append(step)
    return steps


def remove_incomplete(folder: Path) -> None:
    """Delete incomplete checkpoints that a crash left."""
    for checkpoint in list_folders(folder):
        if not is_complete(checkpoint):
            _remove(checkpoint)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps.

    Some other machine lacks them, and they will be written again.
    """
    for checkpoint in list_folders(folder):
        if get_step(checkpoint) > step:
            _remove(checkpoint)


def rotate(folder: Path, keep: int) -> None:
    """Delete the oldest finalised checkpoints beyond `keep`.

    It goes by the marker: the loop started without incomplete ones, and a machine with its own folder lacks the others' files.
    """
    for checkpoint in sorted((path for path in list_folders(folder) if (path / MARKER).exists()), key=get_step)[:-keep]:
        _remove(checkpoint)


def mirror_deletions(folder: Path, main: bool) -> None:
    """Delete checkpoints that the main process no longer has.

    This applies where each machine has its own folder. It is a collective call.
    """
    if not local_storage.storage_is_local():
        return
    names = local_storage.broadcast_from_main({path.name for path in list_folders(folder)})
    if local_storage.is_writer(main) and not main:
        for checkpoint in list_folders(folder):
            if checkpoint.name not in names:
                _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first.

    So a crash leaves none that looks complete. A symbolic link and its target stay.
    """
    if checkpoint.is_symlink():
        return
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _get_fsdp_format(backend: Backend) -> str | None:
    """Get the format of FSDP's checkpoints; None for other backends."""
    return os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT") if backend.uses_fsdp else None


def check_readable(folder: Path, backend: Backend) -> None:
    """Check that the backend can read the newest complete checkpoint.

    One process and DDP read each other's, for any number of processes. So do FSDP and HSDP, which reshard. ZeRO reads what the same stage
    wrote with the same number of processes.

    Args:
        folder: Checkpoints are in it or below it.
        backend: The backend that would resume.

    Raises:
        CommandError: It cannot; the message says what can.
    """
    for checkpoint in sorted({marker.parent for marker in folder.rglob("checkpoint-*/" + MARKER) if NAME.fullmatch(marker.parent.name)}):
        newest = find_last_complete(checkpoint.parent)
        if newest != checkpoint:
            continue
        written_by = read_json(newest / BACKEND_FILE) or {"kind": "ddp"}  # old checkpoints have no such file: only DDP existed
        kind, num_processes = written_by["kind"], written_by.get("processes", 1)
        if kind.startswith("zero"):
            is_readable = (kind, num_processes) == (backend.strategy, backend.world_size)
            remedy = f"--accelerate-config {kind} --num-processes {num_processes}"
        elif kind in ("fsdp2", "hsdp"):
            is_readable = backend.uses_fsdp and written_by.get("format") == _get_fsdp_format(backend)
            remedy = f"--accelerate-config fsdp or hsdp and any number of processes (fsdp_state_dict_type: {written_by.get('format')})"
        else:
            is_readable = backend.strategy in ("single", "ddp")
            remedy = "one process, or --accelerate-config ddp and any number of processes"
        if not is_readable:
            reason = ": DeepSpeed's partitions are for one number of processes" if kind.startswith("zero") else ""
            raise CommandError(
                f"{newest} was written by {kind} with {num_processes} process{'es' if num_processes > 1 else ''}, and {backend.strategy} with {backend.world_size} cannot go on from it{reason}.\n"
                f"  Go on with {remedy}.\n  Or remove {checkpoint.parent}: earlier phases stay, this training starts again"
            )
