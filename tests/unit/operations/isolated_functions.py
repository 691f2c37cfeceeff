"""Functions that test_isolation calls in a process of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A value, and the process that returned it."""

    value: Any
    pid: int


def return_with_pid(value: Any) -> Answer:
    return Answer(value, os.getpid())


def import_torch() -> bool:
    import torch

    return bool(torch.__version__) and "torch" in sys.modules


def get_folder() -> str:
    import json

    assert json.loads("1") == 1
    return str(Path.cwd())


def raise_error(error: BaseException) -> None:
    raise error


def return_function() -> Callable[[], int]:
    return lambda: 1


def print_lines() -> None:
    print("on stdout")
    print("on stderr", file=sys.stderr)


def print_and_exit(code: int) -> None:
    print_lines()
    sys.exit(code)


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def fork_and_kill_itself(seconds: float) -> None:
    if os.fork() == 0:
        time.sleep(seconds)
        os._exit(0)
    kill_itself(signal.SIGKILL)


def _begin(marker: str, number: int) -> None:
    """Write a file that says that an interrupt may come; whole at once."""
    temporary = Path(f"{marker}.tmp")
    temporary.write_text(str(os.getpid()))
    temporary.rename(f"{marker}{number}")


def save_when_interrupted(marker: str) -> str:
    try:
        _begin(marker, 0)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        return "saved"
    return "not interrupted"


def wait_for_ever(marker: str) -> None:
    _begin(marker, 0)
    time.sleep(60)


def ignore_interrupts(marker: str) -> None:
    signal.signal(signal.SIGINT, lambda *_: _begin(marker, 1))
    _begin(marker, 0)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.1)
