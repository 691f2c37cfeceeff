"""What a user can be told, and the exit code that goes with it.

Knows the kinds of failure; every other module raises one of these and `cli` alone turns them into text and a code.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass, field

_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited or there was a network error")
_DISK = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos", "enforce fail at inline_container")
DONE = 0
FAILED = 1
WRONG = 2
CANNOT = 3
SIGINT = 130
SIGTERM = 143


@dataclass(frozen=True)
class Place:
    """Where something was written. Lines and columns count from 1; line 0 stands for a place that has no lines."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class AzrecipeError(Exception):
    """Base of everything that ends a command with a message and no traceback."""

    exit_code = FAILED


class RunFailed(AzrecipeError):
    """The run was right to start and failed (exit code 1)."""


class AllFailed(RunFailed):
    """Every process of the run failed for the same reason at the same place: the main one tells it for all."""


@dataclass
class RecipeError(AzrecipeError):
    """The recipe or the command is wrong and nothing was started (exit code 2). Holds every problem found."""

    problems: list[Problem] = field(default_factory=list)
    exit_code = WRONG

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class CommandError(AzrecipeError):
    """The command line or what it finds in the way is wrong; there is no place in a recipe to point at (exit code 2)."""

    exit_code = WRONG


class CannotRun(AzrecipeError):
    """The environment cannot do it: no GPU, memory, disk, network, licence or package (exit code 3)."""

    exit_code = CANNOT


class Interrupted(AzrecipeError):
    """A signal ended the run after a checkpoint was saved (exit code 130 for SIGINT, 143 for SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the known words, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def hint(word: str, known: Iterable[str], label: str) -> str:
    """The end of a message about an unknown word: the nearest known one where there is one, then all, after a label."""
    known = list(known)
    return f"{did_you_mean(word, known) or '.'} {label}: {allowed(known)}"


def allowed(known: Iterable[str]) -> str:
    """The known words, in a list that a message can end with."""
    return ", ".join(sorted(known))


def explain(error: BaseException) -> AzrecipeError | None:
    """The same failure as something a user can be told, or None for a defect, whose traceback is wanted."""
    if isinstance(error, AzrecipeError):
        return error
    text = str(error)
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(part in text for part in _DISK):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return CannotRun(
            f"the disk is full{where}. What was being written is discarded and the last complete checkpoint is kept: free space, then run the same command again"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in text:
        return CannotRun(
            f"out of memory: {text.splitlines()[0] if text else 'no more to be had'}\n"
            "  Lower training.per_device_train_batch_size (the global batch and the result stay the same) or data.max_length, "
            "or set training.activation_checkpointing=true"
        )
    if isinstance(error, (PermissionError, NotADirectoryError)) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return CannotRun(f"{error.filename}: cannot be opened or written: {error.strerror}")
    if any(part in text for part in _PEER):
        return RunFailed("another process of this run ended; its own message says why")
    return None
