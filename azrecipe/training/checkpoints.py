"""Checkpoints that are complete or not there: a marker written last, the newest whole one found again, and who can read it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CannotRun, CommandError
from azrecipe.utils.atomic_files import file_sizes, read_json, sync_tree, write_json

MARKER = "COMPLETE.json"
WRITTEN_BY = "backend.json"


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name (checkpoint-120)."""
    return int(folder.name.rsplit("-", 1)[1])


def seal(folder: Path, backend: Backend, elsewhere: Mapping[str, int] | None = None) -> None:
    """Sync a written checkpoint to disk and mark it complete; only then does `last_complete` see it.

    `elsewhere`: sizes of the files that other machines hold of it, where each has a folder of its own.
    """
    mark(folder, {**(elsewhere or {}), **sync(folder, backend)})


def sync(folder: Path, backend: Backend) -> dict[str, int]:
    """Bring what this machine holds of a written checkpoint to disk; returns the sizes of its files."""
    if backend.main:
        write_json(folder / WRITTEN_BY, {"kind": backend.kind, "processes": backend.world, "format": _format(backend)})
    return sync_tree(folder)


def mark(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write the marker, last, with the sizes of all files."""
    write_json(folder / MARKER, sizes)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its marker and every file in the size that the marker gives."""
    try:
        sizes = _marked(folder)
        return sizes is not None and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def _marked(folder: Path) -> dict[str, int] | None:
    """The sizes in a checkpoint's marker; None without one that is whole."""
    try:
        sizes: dict[str, int] | None = read_json(folder / MARKER)
    except ValueError:
        return None
    return sizes


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted((c for c in folder.glob("checkpoint-*") if is_complete(c)), key=step_of)


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def agreed(folder: Path) -> tuple[Path | None, str]:
    """The newest checkpoint that is complete for every process, or None; and in words what some have and others lack. A collective.

    Raises CannotRun, nothing deleted, where none is complete for all and one is for all machines together.
    """
    every = local_storage.gathered([step_of(found) for found in complete(folder)])
    common, some = set(every[0]).intersection(*every), set().union(*every)
    newest = folder / f"checkpoint-{max(common)}" if common else None
    if local_storage.apart() and not common and (together := _together(folder)):
        raise CannotRun(
            f"{folder}/checkpoint-{together[-1]} is whole on all machines together and not on each: what was uploaded has not been copied to them.\n"
            f"  Copy it to every machine first, or remove {folder} on all of them: this training then begins anew"
        )
    if not some or max(some) in common:
        return newest, ""
    lacking = ", ".join(str(rank) for rank, steps in enumerate(every) if max(some) not in steps)
    instead = newest.name if newest else "the start, as no checkpoint is whole for all"
    return newest, f"checkpoint-{max(some)} is not whole where process {lacking} looks: going on from {instead}"


def _together(folder: Path) -> list[int]:
    """The steps whose checkpoints are complete if what the machines have is put together. A collective."""
    every = local_storage.gathered({step_of(found): (_marked(found), file_sizes(found)) for found in folder.glob("checkpoint-*")})
    found = []
    for step in sorted(set().union(*every)):
        parts = [each[step] for each in every if step in each]
        marker = next((marked for marked, _ in parts if marked is not None), None)
        files = {name: size for _, sizes in parts for name, size in sizes.items()}
        if marker is not None and all(files.get(name) == size for name, size in marker.items()):
            found.append(step)
    return found


def remove_torn(folder: Path) -> None:
    """Delete what a crash left half-written, so that it is never mistaken for a checkpoint."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not is_complete(checkpoint):
            _remove(checkpoint)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: some other machine lacks them, and they will be written anew."""
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) > step:
            _remove(checkpoint)


def rotate(folder: Path, keep: int) -> None:
    """Delete the oldest sealed checkpoints beyond `keep`.

    The marker tells: when the loop began none was torn, and where machines have a folder each this one lacks the others' files.
    """
    for old in sorted((marker.parent for marker in folder.glob("checkpoint-*/" + MARKER)), key=step_of)[:-keep]:
        _remove(old)


def follow(folder: Path, main: bool) -> None:
    """Where each machine has a folder of its own, delete from the others' what the main process' has no more. A collective."""
    if not local_storage.apart():
        return
    kept = local_storage.from_main({found.name for found in folder.glob("checkpoint-*")})
    if local_storage.writes(main) and not main:
        for checkpoint in folder.glob("checkpoint-*"):
            if checkpoint.name not in kept:
                _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a link in its place stays, with what is behind it. The marker goes first: a crash leaves none that looks whole."""
    if checkpoint.is_symlink():
        return
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _format(backend: Backend) -> str | None:
    return os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT") if backend.fsdp else None


def check_readable(folder: Path, backend: Backend) -> None:
    """Raise CommandError where the newest complete checkpoint in or below a folder was written by a backend that this one cannot read.

    One process and DDP read each other's, for any number of processes; so do FSDP and HSDP, which reshard. ZeRO reads what the
    same stage wrote with the same number of processes.
    """
    for place in sorted({found.parent for found in folder.rglob("checkpoint-*/" + MARKER)}):
        newest = last_complete(place.parent)
        if newest != place:
            continue
        by = read_json(newest / WRITTEN_BY) or {"kind": "ddp"}  # before it was written down there was nothing else
        kind, world = by["kind"], by.get("processes", 1)
        if kind.startswith("zero"):
            same, way = (kind, world) == (backend.kind, backend.world), f"--accelerate-config {kind} --num-processes {world}"
        elif kind in ("fsdp2", "hsdp"):
            same = backend.fsdp and by.get("format") == _format(backend)
            way = f"--accelerate-config fsdp or hsdp and any number of processes (fsdp_state_dict_type: {by.get('format')})"
        else:
            same, way = backend.kind in ("single", "ddp"), "one process, or --accelerate-config ddp and any number of processes"
        if not same:
            why = ": DeepSpeed's partitions are for one number of processes, and are not converted here" if kind.startswith("zero") else ""
            raise CommandError(
                f"{newest} was written by {kind} with {world} process{'es' if world > 1 else ''}, and {backend.kind} with {backend.world} cannot go on from it{why}.\n"
                f"  Go on with {way}.\n  Or remove {place.parent}: what was trained before is kept, this training begins anew"
            )
