"""Write, find, check and delete checkpoints.

A marker file is written last. A checkpoint without it is incomplete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CannotRun, CommandError
from azrecipe.utils.atomic_files import list_file_sizes, read_json, sync_tree, write_json
from azrecipe.utils.checksums import compute_checksum, find_damaged_file

MARKER = "COMPLETE.json"
NAME = re.compile(r"checkpoint-\d+")
BACKEND_FILE = "backend.json"
CHECKSUM = "xxh3_128"  # in the marker
DAMAGED = "is not what was written (its checksum differs), so this checkpoint is not used"
FileRecord = int | dict[str, Any]  # the size, and the checksum; earlier versions wrote the size alone


def list_folders(folder: Path) -> list[Path]:
    """List the checkpoint-<step> folders.

    A copy by another name is the user's, and so is what a link points to.
    """
    return [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def get_step(folder: Path) -> int:
    """Get the optimizer step from a checkpoint folder's name (checkpoint-120)."""
    return int(folder.name.rsplit("-", 1)[1])


def finalize(folder: Path, backend: Backend, remote_sizes: Mapping[str, FileRecord] | None = None) -> None:
    """Sync a written checkpoint to disk and mark it complete.

    Only then does `find_last_complete` find it. `remote_sizes` has the records of its files on other machines, if each has its own folder.
    """
    write_marker(folder, {**(remote_sizes or {}), **sync_checkpoint(folder, backend)})


def sync_checkpoint(folder: Path, backend: Backend) -> dict[str, FileRecord]:
    """Sync this machine's files of a checkpoint to disk.

    Returns their sizes and checksums.
    """
    if backend.main:
        write_json(folder / BACKEND_FILE, {"kind": backend.strategy, "processes": backend.world_size, "format": _get_fsdp_format(backend)})
    return {name: {"size": size, CHECKSUM: compute_checksum(folder / name)} for name, size in sync_tree(folder).items()}


def write_marker(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the marker, last, with the sizes and checksums of all files."""
    write_json(folder / MARKER, files)


def is_complete(folder: Path) -> bool:
    """Tell whether a checkpoint has its marker and every file.

    Each file must have the size that the marker says. `find_latest_common` looks at the content too.
    """
    try:
        sizes = _read_marker(folder)
        return (
            sizes is not None
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
            and _read_backend(folder) is not None
        )
    except OSError:
        return False


def _read_marker(folder: Path) -> dict[str, int] | None:
    """Read the sizes in a checkpoint's marker; None without a valid one."""
    files = _read_records(folder)
    sizes = {name: record.get("size") if isinstance(record, dict) else record for name, record in files.items()}
    return (
        {name: size for name, size in sizes.items() if isinstance(size, int)}
        if all(isinstance(s, int) for s in sizes.values()) and sizes
        else None
    )


def _read_checksums(folder: Path) -> dict[str, str]:
    """Read the checksums in a marker; those of earlier versions have none."""
    return {
        name: str(record[CHECKSUM]) for name, record in _read_records(folder).items() if isinstance(record, dict) and CHECKSUM in record
    }


def _read_records(folder: Path) -> dict[str, Any]:
    try:
        files = read_json(folder / MARKER)
    except ValueError:
        return {}
    return files if isinstance(files, dict) else {}


def _read_backend(folder: Path) -> dict[str, Any] | None:
    """Read which backend wrote a checkpoint; None where the file is damaged.

    Old checkpoints have no such file: only DDP existed.
    """
    try:
        written_by = read_json(folder / BACKEND_FILE)
    except ValueError:
        return None
    if written_by is None:
        return {"kind": "ddp"}
    return written_by if isinstance(written_by, dict) and isinstance(written_by.get("kind"), str) else None


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

    The content of the one that is returned has its checksums: nothing of it has been unpickled before. A damaged one loses its marker.
    """
    warnings = []
    while True:
        common = _find_common(folder)
        reasons = local_storage.all_gather_object(_check_content(common.path) if common.path is not None else "")
        warnings += [warning for warning in (common.warning, *dict.fromkeys(filter(None, reasons))) if warning and warning not in warnings]
        if common.path is None or not any(reason.endswith(DAMAGED) for reason in reasons):
            return CommonCheckpoint(common.path, "; ".join(warnings))


def _check_content(checkpoint: Path) -> str:
    """Compare a checkpoint's files to their checksums; return a warning.

    One process of each machine, or of all that share the storage, reads them.
    """
    if not local_storage.is_writer(os.environ.get("RANK", "0") == "0"):
        return ""
    checksums = _read_checksums(checkpoint)
    if not checksums:
        return f"{checkpoint.name} has no checksums, as an earlier version wrote it: its files are used as they are"
    local = {name: checksum for name, checksum in checksums.items() if (checkpoint / name).exists()}
    name = find_damaged_file(checkpoint, local)
    if name is None:
        return ""
    (checkpoint / MARKER).unlink()
    return f"{checkpoint.name}: {name} {DAMAGED}"


def _find_common(folder: Path) -> CommonCheckpoint:
    """Find the newest checkpoint whose files all processes have."""
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
        written_by = _read_backend(newest) or {"kind": "ddp"}
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
