"""How work on text is spread over the cores: processes with one thread each, results in order, little text in memory at a time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from typing import Any, TypeVar

from azrecipe.errors import CannotRun

ALONE = 1_000_000  # characters: this process works on less by itself, sooner than others start
CHUNK = 500_000  # characters that a process takes at a time

Result = TypeVar("Result")
Chunk = TypeVar("Chunk")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunked(texts: Iterable[str], size: int = CHUNK) -> Iterator[list[str]]:
    """Texts in lists of about `size` characters."""
    chunk: list[str] = []
    held = 0
    for text in texts:
        chunk.append(text)
        held += len(text)
        if held >= size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def characters(texts: Any) -> int:
    """How much work a list of texts is."""
    return sum(map(len, texts))


class Workers:
    """Processes that start once there has been text enough for them, and stay until the `with` ends."""

    def __init__(self, count: int | None = None, alone: int = ALONE) -> None:
        self.count, self.alone = count or cores(), alone
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[..., Result], given: Sequence[Any], chunks: Iterable[Chunk], size: Callable[[Chunk], int] = characters
    ) -> Iterator[Result]:
        """function(*given, chunk) for each chunk, in order. At most two chunks a process, or ALONE, are held.

        Raises CannotRun where a process dies.
        """
        remaining = iter(chunks)
        held = []
        for chunk in remaining if self.count > 1 else ():
            held.append(chunk)
            self.alone -= size(chunk)
            if self.alone <= 0:
                break
        if self.alone > 0 or self.count == 1:
            yield from (function(*given, chunk) for chunk in chain(held, remaining))
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for chunk in chain(held, remaining):
                waiting.append(self._started().submit(function, *given, chunk))
                if len(waiting) >= 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise CannotRun("a process that worked on text was killed: most likely there was no memory left for it") from None

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # spawned, not forked: the tokenizers library may have threads of its own by now
            self.pool = ProcessPoolExecutor(self.count, get_context("spawn"), _one_thread)
        return self.pool


def _one_thread() -> None:
    """In a process of the pool, which is one of as many as there are cores. Ctrl-C is the parent's to answer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A parent that was killed could not end its pool: its processes would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
