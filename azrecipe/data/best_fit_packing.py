"""Knows how documents are laid into sequences so that none is cut that fits: window by window of the order, the same everywhere.

A document longer than a sequence is cut into pieces of its length and what remains; a shorter one is one piece. The
pieces of a window of documents are put together by best-fit decreasing, and its sequences shuffled with the mix's seed.
Windows begin at multiples of about 1024 sequences' tokens, at most one epoch, so that the order of the mix is kept and a
sequence is found by its number: only the windows' running counts are planned ahead.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from azrecipe.data.mixture import BYTES, TOKENS, Ints, Mix
from azrecipe.utils.atomic_files import locked, read_json, write_json

FORMAT = 1
WINDOW = 1024  # sequences of a window
SAVED = 16  # windows that are planned again sooner than their counts are read from the cache
DOCUMENTS, SEQUENCES = 0, 1  # columns of a window's running counts, before tokens and bytes


@dataclass(frozen=True)
class Piece:
    """A part of a document in a sequence: nth document of the order, its first token there (BOS counts), tokens."""

    nth: int
    first: int
    tokens: int


@dataclass(frozen=True)
class Window:
    """A window's pieces [p, 3] (nth, first, tokens) by sequence; sequence s has those from offsets[s] to offsets[s + 1].

    `ends` [sequences + 1, 2]: tokens and bytes before each sequence of the window, and in all.
    """

    pieces: Ints
    offsets: Ints
    ends: Ints


def best_fit(lengths: Ints, room: int) -> Ints:
    """Which bin each piece [n] goes to, bins of `room` each: longest first, into the fullest bin that it fits into.

    Best-fit decreasing (Johnson 1973); of equal pieces and equally full bins the first comes first. O(n log n).
    """
    bins = np.empty(len(lengths), np.int64)
    scale, count = 1 << 40, 0  # an open bin is the number free · scale + bin
    free: list[int] = []
    for nth in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[nth])
        at = bisect_left(free, size * scale)
        if at < len(free):
            left = free.pop(at) - size * scale
        else:
            left = (room - size) * scale + count
            count += 1
        bins[nth] = left % scale
        if left >= scale:
            insort(free, left)
    return bins


class Fitted:
    """Sequences of at most `max_length` tokens, from number `start` on: packed by best fit, or, not `packed`, a piece each."""

    def __init__(self, mix: Mix, max_length: int, packed: bool, start: int = 0, cache: Path | None = None) -> None:
        self.mix, self.max_length, self.packed, self.start, self.cache = mix, max_length, packed, start, cache
        windows = max(1, round(mix.epoch_tokens / (WINDOW * max_length)))
        self.step = -(-mix.epoch_tokens // windows)  # tokens from a window's beginning to the next one's
        self.ends: list[list[int]] = [[0, 0, 0, 0]]  # running counts before each window: documents, sequences, tokens, bytes
        self._held: dict[int, Window] = {}

    @property
    def fingerprint(self) -> str:
        """A name for these sequences; equal for runs that can continue one another."""
        what = [FORMAT, self.mix.fingerprint, "bfd" if self.packed else "unpacked", self.max_length, self.step]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    def pieces(self, sequence: int) -> list[Piece]:
        """What stands in a sequence, in order."""
        nth, within = self._find(SEQUENCES, self.start + sequence)
        window = self._window(nth)
        return [Piece(*row) for row in window.pieces[window.offsets[within] : window.offsets[within + 1]].tolist()]

    def amount(self, sequences: int) -> tuple[int, int]:
        """Tokens and bytes of text in the first `sequences` sequences."""
        (tokens, size), (before, size_before) = self._total(self.start + sequences), self._total(self.start)
        return tokens - before, size - size_before

    def reach(self, sequence: int, tokens: int = 0, size: int = 0) -> int:
        """How many sequences from the given one on hold so many tokens and bytes of text; all there are, where they hold less."""
        begin = self.start + sequence
        found = begin
        for column, wanted in ((TOKENS, tokens), (BYTES, size)):
            target = self._total(begin)[column] + wanted
            self._grow(lambda row, c=column, t=target: row[2 + c] >= t)  # type: ignore[misc]
            found = max(found, self._reach(column, target))
        return found - begin

    def _reach(self, column: int, target: int) -> int:
        """The number of the first sequence before which so much has been read."""
        nth = bisect_left(self.ends, target, key=lambda row: row[2 + column]) - 1
        if nth + 1 >= len(self.ends):
            return self.ends[-1][SEQUENCES]
        if nth < 0:
            return 0
        within = np.searchsorted(self._window(nth).ends[:, column] + self.ends[nth][2 + column], target, side="left")
        return self.ends[nth][SEQUENCES] + int(within)

    def available(self, wanted: int) -> int:
        """How many sequences there are, up to `wanted`."""
        self._grow(lambda row: row[SEQUENCES] >= self.start + wanted)
        return min(wanted, self.ends[-1][SEQUENCES] - self.start)

    def begun(self, sequences: int) -> tuple[int, Ints]:
        """The documents of which a part stands before the end of the first `sequences` sequences: so many, and these further ones."""
        end = self.start + sequences
        if end == 0:
            return 0, np.zeros(0, np.int64)
        nth, within = self._find(SEQUENCES, end - 1)
        window = self._window(nth)
        return self.ends[nth][DOCUMENTS], np.unique(window.pieces[: window.offsets[within + 1], 0])

    def _total(self, sequence: int) -> tuple[int, int]:
        """Tokens and bytes of text before a sequence."""
        if sequence == 0:
            return 0, 0
        nth, within = self._find(SEQUENCES, sequence - 1)
        ends = self._window(nth).ends[within + 1]
        return self.ends[nth][2] + int(ends[TOKENS]), self.ends[nth][3] + int(ends[BYTES])

    def _find(self, column: int, at: int) -> tuple[int, int]:
        """The window in which a sequence stands, and its number there."""
        self._grow(lambda row: row[column] > at)
        nth = bisect_left(self.ends, at + 1, key=lambda row: row[column]) - 1
        return nth, at - self.ends[nth][column]

    def _grow(self, enough: Callable[[Sequence[int]], bool]) -> None:
        """Plan windows until there is enough, or no text is left. What takes long is kept in the cache for other processes."""
        if enough(self.ends[-1]):
            return
        file = None if self.cache is None else self.cache / f"sequences-{self.fingerprint}.json"
        with nullcontext() if file is None else locked(file.with_suffix(".lock")):
            known = (read_json(file) or []) if file is not None else []
            if len(known) > len(self.ends):
                self.ends = known
            while not enough(self.ends[-1]) and not self._whole():
                window = self._window(len(self.ends) - 1)
                self.ends.append([self._border(len(self.ends)), *self._sum(window)])
            if file is not None and len(self.ends) > max(len(known), SAVED):
                write_json(file, self.ends)

    def _sum(self, window: Window) -> list[int]:
        _, sequences, tokens, size = self.ends[-1]
        return [sequences + len(window.offsets) - 1, tokens + int(window.ends[-1, TOKENS]), size + int(window.ends[-1, BYTES])]

    def _whole(self) -> bool:
        """Whether the windows planned hold all text there is."""
        self._border(len(self.ends))  # the order as far as the next window needs it
        return self.mix.ended and self.ends[-1][DOCUMENTS] == len(self.mix.order())

    def _border(self, nth: int) -> int:
        """The first document of a window, or the number of documents where the text ends before it."""
        at = nth * self.step
        order = self.mix.order(tokens=at + 1)
        return 0 if nth == 0 else min(len(order), order.find(TOKENS, at) + 1)

    def _window(self, nth: int) -> Window:
        if nth not in self._held:
            if len(self._held) > 3:
                del self._held[next(iter(self._held))]
            self._held[nth] = self._plan(nth)
        return self._held[nth]

    def _plan(self, nth: int) -> Window:
        begin, end = self._border(nth), self._border(nth + 1)
        counts = self.mix.order().counts(begin, end)
        lengths, sizes = counts[:, TOKENS], counts[:, BYTES]
        parts = -(-lengths // self.max_length)
        document = np.repeat(np.arange(end - begin), parts)
        first = (np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)) * self.max_length
        tokens = np.minimum(lengths[document] - first, self.max_length)
        share = [at * sizes[document] // lengths[document] for at in (first, first + tokens)]  # a piece's bytes, in proportion
        if self.packed:
            bins = best_fit(tokens, self.max_length)
            count = int(bins.max(initial=-1)) + 1
            bins = np.random.Generator(np.random.PCG64([self.mix.seed, FORMAT << 32, nth])).permutation(count)[bins]
        else:
            bins, count = np.arange(len(document)), len(document)
        by_bin = np.argsort(bins, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))]).astype(np.int64)
        running = np.zeros((len(document) + 1, 2), np.int64)
        np.cumsum(np.stack([tokens, share[1] - share[0]], 1)[by_bin], axis=0, out=running[1:])
        return Window(np.stack([document + begin, first, tokens], 1)[by_bin], offsets, running[offsets])
