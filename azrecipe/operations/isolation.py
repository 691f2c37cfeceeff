"""Run a function in a process of its own.

This process stays without torch. The request and the answer are pickled, over pipes between the two processes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import azrecipe
from azrecipe.errors import EXIT_SIGTERM, AzrecipeError, CannotRun, Interrupted, RunFailed

P = ParamSpec("P")
T = TypeVar("T")
POLL_SECONDS = 0.5  # how soon the end of a child is noticed that has left no answer
# The child finds this azrecipe first, whatever its folder holds, and afterwards searches as any other process does.
BOOTSTRAP = """
import sys
sys.path.insert(0, sys.argv[1])
import azrecipe
del sys.path[0]
from azrecipe.operations import isolation
isolation.serve_request(int(sys.argv[2]))
"""


class IsolatedCallError(RuntimeError):
    """A defect in an isolated call; the text is the child's traceback."""


@dataclass(frozen=True)
class _Request:
    """A function by its name, and its arguments."""

    module: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Answer:
    """The value that a function returned, or how it ended otherwise."""

    value: Any = None
    error: AzrecipeError | None = None
    traceback: str = ""
    is_interrupted: bool = False  # by Ctrl-C


def run_isolated(function: Callable[P, T], /, *args: P.args, **arguments: P.kwargs) -> T:
    """Call a function in a process of its own.

    What it prints appears as usual. Ctrl-C interrupts it.

    Args:
        function: A function of a module of azrecipe.
        *args: None: arguments are given by keyword.
        **arguments: Its arguments, which can be pickled, as can its result.

    Returns:
        What it returned.

    Raises:
        AzrecipeError: As the function raised it.
        IsolatedCallError: The function raised something else.
        CannotRun: The process was killed, mostly for lack of memory.
    """
    assert not args, "arguments are given by keyword"
    return _call(function, arguments, output=None)


def run_isolated_silently(function: Callable[P, T], /, *args: P.args, **arguments: P.kwargs) -> T:
    """Call a function in a process of its own, without its output.

    Where it does not return, what it printed is part of an IsolatedCallError. Arguments, result and exceptions are those of run_isolated.
    """
    assert not args, "arguments are given by keyword"
    with tempfile.TemporaryFile() as output:
        return _call(function, arguments, output=output)


def _call(function: Callable[..., T], arguments: dict[str, Any], *, output: IO[bytes] | None) -> T:
    request = _Request(function.__module__, function.__qualname__, arguments)
    reader, writer = os.pipe()
    root = str(Path(azrecipe.__file__).resolve().parents[1])
    command = [sys.executable, "-P", "-c", BOOTSTRAP, root, str(writer)]
    try:
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[writer])
        finally:
            os.close(writer)
        answer = _exchange(child, pickle.dumps(request), reader)
    finally:
        os.close(reader)
    if answer is None:
        raise _explain_missing_answer(function.__name__, child.returncode, output)
    if answer.is_interrupted:
        raise KeyboardInterrupt
    if answer.error is not None:
        raise answer.error
    if answer.traceback:
        raise IsolatedCallError(f"{function.__name__}, in a process of its own:\n{answer.traceback}{_read_output(output)}")
    result: T = answer.value
    return result


def _exchange(child: subprocess.Popen[bytes], request: bytes, reader: int) -> _Answer | None:
    """Send the request and wait for the answer; None where none came.

    Ctrl-C reaches the child by itself: this process waits until the child has saved and ended. A second one kills it.
    """
    assert child.stdin is not None
    content = b""
    try:
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(request)
            content = _read_answer(child, reader)
        except KeyboardInterrupt:
            content = _read_answer(child, reader)
            if not content:
                raise
        child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    answer: _Answer | None = pickle.loads(content) if content else None
    return answer


def _read_answer(child: subprocess.Popen[bytes], reader: int) -> bytes:
    """Read to the end of the pipe, or of the child.

    Processes that a killed child leaves behind may hold the pipe open.
    """
    chunks = []
    while True:
        readable, _, _ = select.select([reader], [], [], POLL_SECONDS)
        if readable:
            chunk = os.read(reader, 2**20)
            if not chunk:
                break
            chunks.append(chunk)
        elif child.poll() is not None:
            break
    return b"".join(chunks)


def _explain_missing_answer(name: str, code: int, output: IO[bytes] | None) -> Exception:
    if code == -signal.SIGKILL:
        return CannotRun(f"{name}: its process was killed, which is mostly a lack of memory")
    if code == -signal.SIGTERM:
        return Interrupted(f"{name}: its process was ended by SIGTERM", EXIT_SIGTERM)
    if code < 0:
        return RunFailed(f"{name}: its process was ended by signal {-code} ({signal.Signals(-code).name})")
    return IsolatedCallError(f"{name}: its process ended with exit code {code} and no answer{_read_output(output)}")


def _read_output(output: IO[bytes] | None) -> str:
    """Return what the child printed, where it was hidden."""
    if output is None:
        return ""
    output.seek(0)
    return f"\nIt printed:\n{output.read().decode(errors='replace')}"


def serve_request(writer: int) -> None:
    """Answer the request on stdin through a pipe. The child's main function.

    `writer` is the pipe's file descriptor.
    """
    os.set_inheritable(writer, False)  # a process that outlives this one must not hold the pipe open
    content = pickle.dumps(_answer_request(sys.stdin.buffer.read()))
    sys.stdout.flush()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(content)


def _answer_request(content: bytes) -> _Answer:
    try:
        request: _Request = pickle.loads(content)
        function = getattr(importlib.import_module(request.module), request.name)
        answer = _Answer(value=function(**request.arguments))
        pickle.dumps(answer)  # a result that cannot be pickled is a defect, too
        return answer
    except AzrecipeError as error:
        return _Answer(error=error)
    except KeyboardInterrupt:
        return _Answer(is_interrupted=True)
    except BaseException:
        return _Answer(traceback=traceback.format_exc())
