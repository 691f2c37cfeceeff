"""Collectives for machines that each have their own run directory.

AZRECIPE_STORAGE=local selects this. It is for machines whose files are uploaded in the background to one place, which is copied
to every machine before a run continues. There, file names must be unique for each process, deletions reach the common place, and
of two files that were written one after the other either may be missing. Without the upload a restart would not find the files of
the other machines, so nothing else selects it.
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
from azrecipe.utils.atomic_files import atomic_folder, list_file_sizes, read_json
from azrecipe.utils.environment_variables import STORAGE

STORAGE_KINDS = ("shared", "local")
CHUNK_BYTES = 64 * 2**20  # size of one message

Value = TypeVar("Value")


def storage_is_local() -> bool:
    """Whether each machine has its own run directory.

    Raises CommandError for an unknown value of the variable.
    """
    storage = STORAGE.read()
    if storage not in STORAGE_KINDS:
        raise CommandError(
            f"{STORAGE}={storage} is not known: shared (all machines see one run directory, the default) or local (each has its own)"
        )
    return storage == "local"


def is_writer(main: bool) -> bool:
    """Whether this process writes a run directory.

    The main process does, and with local storage the first process of each machine.
    """
    return main or (storage_is_local() and os.environ.get("LOCAL_RANK", "0") == "0")


def all_gather_object(value: Value, group: Any = None) -> list[Value]:
    """Return the values of all processes, in the order of ranks.

    Without a process group it is the value of this process alone. A collective, of `group` or of all processes.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_from_main(value: Value) -> Value:
    """Return the main process' value with local storage.

    With shared storage the value of this process is returned. A collective.
    """
    return all_gather_object(value)[0] if storage_is_local() else value


def merge_file_sizes(sizes: Mapping[str, Value]) -> dict[str, Value]:
    """Return what all processes know of their files in one mapping.

    With shared storage they are those of this process. A collective.
    """
    size_maps = all_gather_object(dict(sizes)) if storage_is_local() else [sizes]
    return {name: size for size_map in size_maps for name, size in size_map.items()}


def check_same_inputs(status: Path, inputs: Mapping[str, str]) -> None:
    """Check that all machines hold the same run and inputs.

    Raises CannotRun. A collective.
    """
    states = all_gather_object(((read_json(status) or {}).get("run_id"), dict(inputs)))
    main_id, main_inputs = states[0]
    problems = []
    for rank, (run_id, rank_inputs) in enumerate(states):
        if run_id not in (None, main_id):
            problems.append(
                f"{status.parent} of process {rank} holds another run than that of process 0: give both what was uploaded, or nothing"
            )
        if rank_inputs != main_inputs:
            names = ", ".join(sorted(key for key in {*main_inputs, *rank_inputs} if main_inputs.get(key) != rank_inputs.get(key)))
            problems.append(f"process {rank} sees other inputs than process 0: {names}. Every machine needs the same files")
    if problems:
        raise CannotRun("\n".join(problems))


@contextlib.contextmanager
def replicate_folder(folder: Path, cache: Path, main: bool) -> Iterator[Path]:
    """Yield a path where every process can read the folder.

    A collective. The main process has the folder. With local storage the first process of each other machine receives it into `cache`, unless
    the machine has the same files, and removes it after the block.

    Raises:
        RunFailed: Another machine could not write the folder.
        OSError: This machine could not write it.
    """
    if not storage_is_local():
        yield folder
        return
    main_sizes = broadcast_from_main(list_file_sizes(folder))
    local_folder = folder
    if not all(all_gather_object(list_file_sizes(folder) == main_sizes)):
        has_folder = main or list_file_sizes(folder) == main_sizes
        local_folder = folder if has_folder else cache / f"received-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
        _broadcast_folder(folder, main_sizes, target=None if has_folder or not is_writer(main) else local_folder, main=main)
    yield local_folder
    all_gather_object(None)  # every process has read it
    if local_folder != folder and is_writer(main):
        shutil.rmtree(local_folder, ignore_errors=True)


def _broadcast_folder(folder: Path, sizes: Mapping[str, int], *, target: Path | None, main: bool) -> None:
    """Send the main process' folder to all processes. A collective.

    A failure in one process fails all of them, after everything was sent.

    Args:
        folder: The folder in the main process.
        sizes: Its files and their sizes in bytes.
        target: Where this process writes the folder; None: it does not.
        main: Whether this is the main process.
    """
    error: OSError | None = None
    try:
        with contextlib.ExitStack() as stack:
            tmp = None
            try:
                tmp = stack.enter_context(atomic_folder(target)) if target is not None else None
            except OSError as failure:
                error = failure
            for name, size in sizes.items():
                error = _broadcast_file(folder / name, size, target=tmp / name if tmp else None, main=main) or error
            if tmp is not None and error is None and list_file_sizes(tmp) != sizes:
                error = OSError(f"{target}: the files that were received have other sizes than those that were sent")
            if error is not None:
                raise error
    except OSError as failure:
        error = failure
    failures = all_gather_object(str(error or ""))
    if error is not None:
        raise error
    if any(failures):
        rank = next(rank for rank, text in enumerate(failures) if text)
        raise RunFailed(f"{folder} could not be copied to the machine of process {rank}: {failures[rank]}")


def _broadcast_file(source: Path, size: int, *, target: Path | None, main: bool) -> OSError | None:
    """Send one file in chunks; return an error. A collective.

    An error is not raised, as the other processes wait for the remaining chunks.
    """
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    device, error = PartialState().device, None
    with contextlib.ExitStack() as stack:
        try:
            input_file = stack.enter_context(source.open("rb")) if main else None
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
            output_file = stack.enter_context(target.open("wb")) if target is not None else None
        except OSError as failure:
            input_file, output_file, error = None, None, failure
        for begin in range(0, size, CHUNK_BYTES):
            chunk = bytearray(min(CHUNK_BYTES, size - begin))
            try:
                if input_file is not None and input_file.readinto(chunk) != len(chunk):
                    error = OSError(f"{source} became shorter while it was sent")
            except OSError as failure:
                error = failure
            tensor = torch.frombuffer(chunk, dtype=torch.uint8).to(device)
            dist.broadcast(tensor, src=0)
            try:
                if output_file is not None and error is None:
                    output_file.write(tensor.cpu().numpy().tobytes())
            except OSError as failure:
                error = failure
    return error
