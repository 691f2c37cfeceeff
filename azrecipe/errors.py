"""Errors for users, and the exit code of each.

Every other module raises one of these classes. Only `cli` turns them into text and an exit code.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

# gloo's and NCCL's texts for a collective operation that took longer than its group's timeout
_TIMEOUT_MESSAGES = ("Timed out waiting", "Application timeout caused pair closure", "Watchdog caught collective operation timeout")
PEER_ENDED = "another process of this run ended"
_PEER_MESSAGES = ("Connection closed by peer", "Connection reset by peer", "remote process exited or there was a network error")
_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
}
_DISK_FULL_MESSAGES = ("PytorchStreamWriter failed", "unexpected pos", "enforce fail at inline_container")
# What PyTorch, cuBLAS, Triton and NCCL say where memory is out and the error's class does not say it
_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "Cuda failure 2 'out of memory'",
    "CUDNN_STATUS_ALLOC_FAILED",
)
EXIT_SUCCESS = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_CANNOT_RUN = 3
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


@dataclass(frozen=True)
class SourceLocation:
    """A position in a file or on the command line.

    Lines and columns count from 1. Line 0 means that the source has no lines.
    """

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        file = self.file.replace("\n", "\\n").replace("\r", "\\r")  # a name with a line break must not look like another message
        return f"{file}:{self.line}:{self.column}" if self.line else file


@dataclass(frozen=True)
class Problem:
    """One error in a recipe, and its location."""

    location: SourceLocation
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


class AzrecipeError(Exception):
    """Base of errors that end a command without a traceback."""

    exit_code = EXIT_FAILED

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (type(self), self.args, dict(self.__dict__))


def _rebuild_error(error_class: type[AzrecipeError], arguments: tuple[Any, ...], attributes: Mapping[str, Any]) -> AzrecipeError:
    """Rebuild a pickled error without its constructor.

    The constructors of some classes take other values than the exception keeps.
    """
    error = error_class.__new__(error_class)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


class RunFailed(AzrecipeError):
    """The run started correctly and failed (exit code 1)."""


class AllProcessesFailed(RunFailed):
    """Every process of the run failed for the same reason.

    Only the main process prints the message.
    """


@dataclass
class RecipeError(AzrecipeError):
    """The recipe is wrong and nothing was started (exit code 2).

    `problems` holds every problem that was found.
    """

    problems: list[Problem] = field(default_factory=list)
    exit_code = EXIT_WRONG_INPUT

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class CommandError(AzrecipeError):
    """The command line or a file is wrong (exit code 2).

    For errors without a location in a recipe.
    """

    exit_code = EXIT_WRONG_INPUT


class DamagedFileError(CommandError, ValueError):
    """A file that azrecipe wrote holds something else."""


class CannotRun(AzrecipeError):
    """The environment cannot run the recipe (exit code 3).

    It lacks a GPU, memory, disk space, a network, a licence or a package.
    """

    exit_code = EXIT_CANNOT_RUN


class Interrupted(AzrecipeError):
    """A signal ended the run after a checkpoint was saved.

    The exit code is 130 for SIGINT and 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_error(exit_code: int, message: str) -> AzrecipeError:
    """Build the error of a process that ended with an exit code."""
    if exit_code in (EXIT_SIGINT, EXIT_SIGTERM):
        return Interrupted(message, exit_code)
    return {EXIT_WRONG_INPUT: CommandError, EXIT_CANNOT_RUN: CannotRun}.get(exit_code, RunFailed)(message)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest choice.

    Returns "" where no choice is near.
    """
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def suggest_choices(word: str, choices: Iterable[str], label: str) -> str:
    """Return the end of a message about an unknown word.

    It names the nearest choice, if one is near, and then all choices after `label`.
    """
    choices = list(choices)
    return f"{did_you_mean(word, choices) or '.'} {label}: {list_choices(choices)}"


def list_choices(choices: Iterable[str]) -> str:
    """Return the choices in order, separated by commas."""
    return ", ".join(sorted(choices))


@contextmanager
def name_written_path(path: object) -> Iterator[None]:
    """Give an exception of the block the path that is written.

    Libraries, and writing to an open file, do not name it.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "written_path"):  # the innermost is the most precise
            with suppress(AttributeError):
                error.written_path = str(path)  # type: ignore[attr-defined]
        raise


def get_first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory of a GPU or the machine was out."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(part in str(error) for part in _MEMORY)


def explain_error(error: BaseException) -> AzrecipeError | None:
    """Return the failure as an error for users.

    Returns None for a defect of azrecipe, whose traceback is needed.
    """
    if isinstance(error, AzrecipeError):
        return error
    text = str(error)
    if (reason := _explain_full_disk(error)) is not None:
        written = getattr(error, "written_path", None) or (error.filename if isinstance(error, OSError) else None)
        where = f" ({written})" if written else ""
        return CannotRun(
            f"{reason}{where}. What was being written is discarded and the last complete checkpoint is kept: free space, then run the same command again"
        )
    if isinstance(error, MemoryError):  # Python's own: main memory, not that of a GPU
        return CannotRun(
            f"out of memory: {text.splitlines()[0] if text else 'this machine has no main memory left for it'}\n"
            "  Free main memory, or use a machine with more. Where text was read or tokenised: data with shorter documents, or a lower "
            "max_document_bytes"
        )
    if is_out_of_memory(error):
        return CannotRun(
            f"out of memory: {text.splitlines()[0] if text else 'no memory is left'}\n"
            "  Lower training.per_device_train_batch_size (the global batch and the result stay the same) or data.max_length, "
            "or set training.activation_checkpointing=true"
        )
    if isinstance(error, (PermissionError, NotADirectoryError)) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return CannotRun(f"{error.filename}: cannot be opened or written: {error.strerror}")
    if any(part in text for part in _TIMEOUT_MESSAGES):
        return RunFailed(
            "a process of this run did not answer in time (AZRECIPE_STEP_TIMEOUT): it is stopped, lost or far slower than the others. "
            "What the others were doing is in the folder stacks of the run directory"
        )
    if any(part in text for part in _PEER_MESSAGES):
        return RunFailed(f"{PEER_ENDED}; its own message says why")
    return None


def _explain_full_disk(error: BaseException) -> str | None:
    """Say what is full where a file could not be written; else None.

    The errors of libraries in Rust are no OSError and have its text only.
    """
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return _DISK_FULL[error.errno]
    text = str(error)
    for number, reason in _DISK_FULL.items():
        if os.strerror(number) in text or f"(os error {number})" in text:
            return reason
    return _DISK_FULL[errno.ENOSPC] if any(part in text for part in _DISK_FULL_MESSAGES) else None
