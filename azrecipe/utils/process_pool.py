"""Run a function over text in several processes, in order.

Each process has one thread. Only a few chunks of text are in memory at a time.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from typing import Any, TypeVar

from azrecipe.errors import CannotRun
from azrecipe.utils.parent_watch import end_with_parent

MIN_POOL_CHARACTERS = 1_000_000  # this process finishes less text sooner than other processes start
CHUNK_CHARACTERS = 500_000  # characters in a chunk

Result = TypeVar("Result")
Chunk = TypeVar("Chunk")


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunk_texts(texts: Iterable[str], size: int = CHUNK_CHARACTERS) -> Iterator[list[str]]:
    """Yield the texts in lists of about `size` characters."""
    chunk: list[str] = []
    num_characters = 0
    for text in texts:
        chunk.append(text)
        num_characters += len(text)
        if num_characters >= size:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def count_characters(texts: Any) -> int:
    """Return the number of characters in a list of texts."""
    return sum(map(len, texts))


class WorkerPool:
    """A pool of processes for work on text.

    The processes start once there was enough text for them, and end with the `with` block.
    """

    def __init__(self, count: int | None = None, min_characters: int = MIN_POOL_CHARACTERS) -> None:
        """Set the sizes; no process starts yet.

        `count` is the number of processes, by default one a core. `min_characters` is how many characters this
        process takes before they start.
        """
        self.count, self.remaining_characters = count or count_cores(), min_characters
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map_chunks(
        self,
        function: Callable[..., Result],
        arguments: Sequence[Any],
        chunks: Iterable[Chunk],
        size: Callable[[Chunk], int] = count_characters,
    ) -> Iterator[Result]:
        """Yield the function's result for each chunk, in order.

        At most two chunks a process are in memory, or the text that this process takes before the pool starts.

        Args:
            function: Called as function(*arguments, chunk).
            arguments: The first arguments of each call.
            chunks: The work, read as it is needed.
            size: Returns the number of characters in a chunk.

        Raises:
            CannotRun: A process of the pool was killed.
        """
        remaining = iter(chunks)
        first_chunks = []
        for chunk in remaining if self.count > 1 else ():
            first_chunks.append(chunk)
            self.remaining_characters -= size(chunk)
            if self.remaining_characters <= 0:
                break
        if self.remaining_characters > 0 or self.count == 1:
            yield from (function(*arguments, chunk) for chunk in chain(first_chunks, remaining))
            return
        pending: deque[Future[Result]] = deque()
        try:
            for chunk in chain(first_chunks, remaining):
                pending.append(self._start_pool().submit(function, *arguments, chunk))
                if len(pending) >= 2 * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise CannotRun("a process that worked on text was killed: most likely there was no memory left for it") from None

    def _start_pool(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # Processes are spawned, not forked: the tokenizers library may have started threads.
            self.pool = ProcessPoolExecutor(self.count, get_context("spawn"), _initialize_worker, (os.getpid(),))
        return self.pool


def _initialize_worker(parent: int) -> None:
    """Limit a worker to one thread; leave signals to the parent.

    A parent that was killed cannot end its pool, whose processes would wait for work for ever: they end by themselves.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
