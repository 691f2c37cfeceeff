"""Knows whether the machines of a run see one run directory or have one each, and how those that have one each come to know the same.

One each is for machines whose files are uploaded in the background to one common place, which is copied down to every machine before a
run goes on: names must be unique by process, deletions reach the common place, and of two files that were written one after the other
either may be missing there. AZRECIPE_STORAGE=local says so; nothing else does, as without the upload a restart would not find the other
machines' files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from azrecipe.errors import CannotRun, CommandError, RunFailed
from azrecipe.utils.atomic_files import file_sizes, read_json, whole_folder

SWITCH = "AZRECIPE_STORAGE"
KINDS = ("shared", "local")
CHUNK = 64 * 2**20  # bytes that are sent at a time

Value = TypeVar("Value")


def apart() -> bool:
    """Whether each machine has a run directory of its own. Raises CommandError for a word that is not known."""
    asked = os.environ.get(SWITCH) or "shared"
    if asked not in KINDS:
        raise CommandError(
            f"{SWITCH}={asked} is not known: shared (all machines see one run directory, the default) or local (each has its own)"
        )
    return asked == "local"


def writes(main: bool) -> bool:
    """Whether this process acts for a run directory: the main one, or where each machine has its own the first process of each."""
    return main or (apart() and os.environ.get("LOCAL_RANK", "0") == "0")


def gathered(value: Value) -> list[Value]:
    """Every process' value, in the order of their ranks; the own one where no others are connected. A collective."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def from_main(value: Value) -> Value:
    """The main process' value, where machines are apart and connected; else this process' own. A collective."""
    return gathered(value)[0] if apart() else value


def merged(sizes: Mapping[str, int]) -> dict[str, int]:
    """What each process lists of a folder's files, all together; this process' own where storage is shared. A collective."""
    every = gathered(dict(sizes)) if apart() else [sizes]
    return {name: size for each in every for name, size in each.items()}


def agree(status: Path, seen: Mapping[str, str]) -> None:
    """Check that no machine holds another run's files, and that all see the same inputs. Raises CannotRun; a collective."""
    every = gathered(((read_json(status) or {}).get("run_id"), dict(seen)))
    run_id, inputs = every[0]
    problems = []
    for rank, (own, other) in enumerate(every):
        if own not in (None, run_id):
            problems.append(
                f"{status.parent} of process {rank} holds another run than that of process 0: give both what was uploaded, or nothing"
            )
        if other != inputs:
            names = ", ".join(sorted(key for key in {*inputs, *other} if inputs.get(key) != other.get(key)))
            problems.append(f"process {rank} sees other inputs than process 0: {names}. Every machine needs the same files")
    if problems:
        raise CannotRun("\n".join(problems))


@contextlib.contextmanager
def everywhere(folder: Path, cache: Path, main: bool) -> Iterator[Path]:
    """A folder that the main process has, for every process to read within the block. A collective.

    Where machines are apart the others' first processes receive it into `cache` for as long as the block lasts, unless they have it
    already. Raises RunFailed, or OSError where this machine cannot write it.
    """
    if not apart():
        yield folder
        return
    wanted = from_main(file_sizes(folder))
    here = folder
    if not all(gathered(file_sizes(folder) == wanted)):
        own = main or file_sizes(folder) == wanted
        here = folder if own else cache / f"received-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
        _send(folder, wanted, None if own or not writes(main) else here, main)
    yield here
    gathered(None)  # every process has read it
    if here != folder and writes(main):
        shutil.rmtree(here, ignore_errors=True)


def _send(folder: Path, sizes: Mapping[str, int], to: Path | None, main: bool) -> None:
    """Send the main process' folder to all; written to `to` by those that give one. What fails on one fails on all, when all is sent."""
    error: OSError | None = None
    try:
        with contextlib.ExitStack() as stack:
            aside = None
            try:
                aside = stack.enter_context(whole_folder(to)) if to is not None else None
            except OSError as failed:
                error = failed
            for name, size in sizes.items():
                error = _send_file(folder / name, size, aside / name if aside else None, main) or error
            if aside is not None and error is None and file_sizes(aside) != sizes:
                error = OSError(f"{to}: what was received has other sizes than what was sent")
            if error is not None:
                raise error
    except OSError as failed:
        error = failed
    failures = gathered(str(error or ""))
    if error is not None:
        raise error
    if any(failures):
        rank = next(rank for rank, text in enumerate(failures) if text)
        raise RunFailed(f"{folder} could not be brought to the machine of process {rank}: {failures[rank]}")


def _send_file(source: Path, size: int, to: Path | None, main: bool) -> OSError | None:
    """One file, in chunks; an error is returned, as the others go on with what is sent."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    device, error = PartialState().device, None
    with contextlib.ExitStack() as stack:
        try:
            read = stack.enter_context(source.open("rb")) if main else None
            if to is not None:
                to.parent.mkdir(parents=True, exist_ok=True)
            written = stack.enter_context(to.open("wb")) if to is not None else None
        except OSError as failed:
            read, written, error = None, None, failed
        for begin in range(0, size, CHUNK):
            chunk = bytearray(min(CHUNK, size - begin))
            try:
                if read is not None and read.readinto(chunk) != len(chunk):
                    error = OSError(f"{source} became shorter while it was sent")
            except OSError as failed:
                error = failed
            sent = torch.frombuffer(chunk, dtype=torch.uint8).to(device)
            dist.broadcast(sent, src=0)
            try:
                if written is not None and error is None:
                    written.write(sent.cpu().numpy().tobytes())
            except OSError as failed:
                error = failed
    return error
