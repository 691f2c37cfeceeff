"""Pack documents into sequences by best fit, window by window.

A document longer than a sequence is cut into pieces of a sequence's length and a rest; a shorter one is one piece. The
pieces of a window of documents are packed by best-fit decreasing, and the window's sequences are shuffled with the seed
of the mixture. A window has the tokens of about 1024 sequences, at most one epoch, so the order of the mixture is kept.
Where the mix changes, a window ends.
A sequence is looked up by its number; only the running counts of the windows are computed ahead. Every process computes
the same sequences.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from azrecipe.data.mixture import BYTE_COLUMN, TOKEN_COLUMN, Mixture, TextCounts
from azrecipe.utils.atomic_files import hold_lock, read_json, write_json
from azrecipe.utils.bootstrap import IntArray

LAYOUT_FORMAT = 1
WINDOW_SEQUENCES = 1024
MIN_CACHED_WINDOWS = 16  # fewer windows are computed again sooner than their counts are read from the cache
MAX_WINDOWS_IN_MEMORY = 4


@dataclass(frozen=True)
class DocumentSpan:
    """A part of a document in a sequence.

    Attributes:
        index: The document's index in the order of the mixture.
        first_token: The first token of the part within the document; a BOS counts as token 0.
        num_tokens: The length of the part.
    """

    index: int
    first_token: int
    num_tokens: int


class WindowCounts(NamedTuple):
    """The documents, sequences, tokens and bytes of text before a window."""

    documents: int
    sequences: int
    tokens: int
    bytes: int

    @property
    def text(self) -> TextCounts:
        """The tokens and bytes, to be read by column."""
        return TextCounts(self.tokens, self.bytes)


@dataclass(frozen=True)
class PackedWindow:
    """The sequences of one window.

    Attributes:
        spans: [spans, 3], a row for each `DocumentSpan`, sequence after sequence.
        offsets: [sequences + 1]; sequence s has the rows from offsets[s] to before offsets[s + 1].
        running_counts: [sequences + 1, 2], tokens and bytes before each sequence of the window, and in all.
    """

    spans: IntArray
    offsets: IntArray
    running_counts: IntArray


def pack_best_fit(lengths: IntArray, capacity: int) -> IntArray:
    """Pack pieces into bins by best-fit decreasing, in O(n log n).

    The method is that of Johnson 1973.

    Pieces go in longest first, each into the fullest bin that it fits into. Of equal pieces, and of equally full bins,
    the first comes first.

    Args:
        lengths: The length of each piece, [pieces], at most `capacity`.
        capacity: What a bin holds.

    Returns:
        The bin of each piece, [pieces].
    """
    bins = np.empty(len(lengths), np.int64)
    scale, count = 1 << 40, 0  # an open bin is the number free * scale + bin
    free: list[int] = []
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        best = bisect_left(free, size * scale)
        if best < len(free):
            remaining = free.pop(best) - size * scale
        else:
            remaining = (capacity - size) * scale + count
            count += 1
        bins[piece] = remaining % scale
        if remaining >= scale:
            insort(free, remaining)
    return bins


class _Cut(NamedTuple):
    """Where the mix changes.

    Attributes:
        window: The number of the last window before.
        document: The first document of the new mix, by its index in the order.
        packed: That window, up to the document.
    """

    window: int
    document: int
    packed: PackedWindow


class BestFitLayout:
    """Sequences packed by best fit, or with one piece each.

    Args:
        mix: The documents in their order.
        max_length: The most tokens of a sequence.
        packed: Whether pieces are packed; without it each is a sequence of its own.
        start: The sequence at which this run begins.
        cache: A folder for running counts that take long to compute.
    """

    def __init__(self, mix: Mixture, max_length: int, packed: bool, start: int = 0, cache: Path | None = None) -> None:
        self.mix, self.max_length, self.packed, self.start, self.cache = mix, max_length, packed, start, cache
        windows = max(1, round(mix.epoch_tokens / (WINDOW_SEQUENCES * max_length)))
        self.window_tokens = -(-mix.epoch_tokens // windows)  # from the beginning of a window to that of the next
        self.window_counts = [WindowCounts(0, 0, 0, 0)]
        self._windows: dict[int, PackedWindow] = {}

    @property
    def fingerprint(self) -> str:
        """A name for these sequences.

        It is equal for runs that can continue one another.
        """
        settings = [LAYOUT_FORMAT, self.mix.fingerprint, "bfd" if self.packed else "unpacked", self.max_length, self.window_tokens]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def find_spans(self, sequence: int) -> list[DocumentSpan]:
        """Find the parts of documents in a sequence, in order."""
        number, row = self._find_window(self.start + sequence)
        window = self._get_window(number)
        return [DocumentSpan(*span) for span in window.spans[window.offsets[row] : window.offsets[row + 1]].tolist()]

    def count_text(self, sequences: int) -> TextCounts:
        """Count tokens and bytes of text in the first `sequences` sequences."""
        end, begin = self._count_before(self.start + sequences), self._count_before(self.start)
        return TextCounts(end.tokens - begin.tokens, end.bytes - begin.bytes)

    def count_sequences(self, first: int, tokens: int = 0, size: int = 0) -> int:
        """Count the sequences, from number `first` on, that hold so much text.

        Args:
            first: The first sequence that counts.
            tokens: The tokens that the sequences hold at least.
            size: The bytes of text that they hold at least.

        Returns:
            The number of sequences; all that there are where they hold less.
        """
        begin = self.start + first
        end = begin
        for column, amount in ((TOKEN_COLUMN, tokens), (BYTE_COLUMN, size)):
            end = max(end, self._find_sequence(column, self._count_before(begin)[column] + amount))
        return end - begin

    def _find_sequence(self, column: int, target: int) -> int:
        """Find the first sequence after `target` tokens or bytes of text."""
        self._plan_until(lambda counts: counts.text[column] >= target)
        number = bisect_left(self.window_counts, target, key=lambda counts: counts.text[column]) - 1
        if number + 1 >= len(self.window_counts):
            return self.window_counts[-1].sequences
        if number < 0:
            return 0
        before = self.window_counts[number]
        running = self._get_window(number).running_counts[:, column] + before.text[column]
        return before.sequences + int(np.searchsorted(running, target, side="left"))

    def count_available(self, limit: int) -> int:
        """Count the sequences that there are, up to `limit`."""
        self._plan_until(lambda counts: counts.sequences >= self.start + limit)
        return min(limit, self.window_counts[-1].sequences - self.start)

    def change_weights(self, sequences: int, weights: Sequence[float]) -> None:
        """Mix with other weights after the first `sequences` sequences.

        What remains of a document that begins before comes first. Where an earlier run ended within a window of best-fit packing, so
        does the rest of that window.
        """
        sequence = self.start + sequences
        cut = self._find_cut(sequence) if sequence else None
        self.mix.change_weights(self.mix.build_order().counts_before(cut.document).tokens if cut else 0, weights)
        number = cut.window if cut else 0
        self.window_counts = self.window_counts[: number + 1]
        self._windows = {key: window for key, window in self._windows.items() if key < number}

    def count_text_before_change(self, first: int, sequences: int) -> TextCounts:
        """Count the text of sequences, as if the mix changed after them.

        Args:
            first: The first sequence that counts.
            sequences: How many count.
        """
        begin, end = self.start + first, self.start + first + sequences
        cut = self._find_cut(end)
        before, running = self.window_counts[cut.window], cut.packed.running_counts
        through = running[end - before.sequences] + before.text
        start = running[begin - before.sequences] + before.text if begin > before.sequences else np.array(self._count_before(begin))
        return TextCounts(*(through - start).tolist())

    def find_started_documents(self, sequences: int) -> tuple[int, IntArray]:
        """Find the documents that begin in or before the first `sequences` sequences.

        Returns:
            How many documents at the beginning of the order are all among them, and the indices of the others.
        """
        end = self.start + sequences
        if end == 0:
            return 0, np.zeros(0, np.int64)
        number, row = self._find_window(end - 1)
        window = self._get_window(number)
        return self.window_counts[number].documents, np.unique(window.spans[: window.offsets[row + 1], 0])

    def _count_before(self, sequence: int) -> TextCounts:
        """Count tokens and bytes of text before a sequence."""
        if sequence == 0:
            return TextCounts(0, 0)
        number, row = self._find_window(sequence - 1)
        before, counts = self.window_counts[number], self._get_window(number).running_counts[row + 1]
        return TextCounts(before.tokens + int(counts[TOKEN_COLUMN]), before.bytes + int(counts[BYTE_COLUMN]))

    def _find_window(self, sequence: int) -> tuple[int, int]:
        """Find the window of a sequence, and the sequence's number in it."""
        self._plan_until(lambda counts: counts.sequences > sequence)
        number = bisect_left(self.window_counts, sequence + 1, key=lambda counts: counts.sequences) - 1
        return number, sequence - self.window_counts[number].sequences

    def _plan_until(self, is_enough: Callable[[WindowCounts], bool]) -> None:
        """Plan windows until there are enough or the text ends.

        Counts that take long to compute are written to the cache, where other processes read them.
        """
        if is_enough(self.window_counts[-1]):
            return
        file = None if self.cache is None else self.cache / f"sequences-{self.fingerprint}.json"
        with nullcontext() if file is None else hold_lock(file.with_suffix(".lock")):
            cached = [WindowCounts(*counts) for counts in (read_json(file) or [])] if file is not None else []
            if len(cached) > len(self.window_counts):
                self.window_counts = cached
            while not is_enough(self.window_counts[-1]) and not self._covers_all_text():
                self.window_counts.append(self._count_through(len(self.window_counts) - 1))
            if file is not None and len(self.window_counts) > max(len(cached), MIN_CACHED_WINDOWS):
                write_json(file, self.window_counts)

    def _count_through(self, number: int) -> WindowCounts:
        """Count what comes before the end of a window."""
        window, before = self._get_window(number), self.window_counts[-1]
        tokens, size = (int(window.running_counts[-1, column]) for column in (TOKEN_COLUMN, BYTE_COLUMN))
        sequences = before.sequences + len(window.offsets) - 1
        return WindowCounts(self._find_first_document(number + 1), sequences, before.tokens + tokens, before.bytes + size)

    def _covers_all_text(self) -> bool:
        """Whether the planned windows hold all the text that there is."""
        self._find_first_document(len(self.window_counts))  # extends the order as far as the next window needs it
        return self.mix.ended and self.window_counts[-1].documents == len(self.mix.build_order())

    def _find_first_document(self, number: int) -> int:
        """Find a window's first document.

        This is the number of documents where the text ends before the window.
        """
        token = self._find_window_start(number)
        order = self.mix.build_order(tokens=token + 1)
        return 0 if number == 0 else min(len(order), order.find_document(TOKEN_COLUMN, token) + 1)

    def _find_window_start(self, number: int) -> int:
        """Find the token at which a window begins.

        A window that begins before a change of the mix ends there.
        """
        for mix, following in pairwise(self.mix.mixes):
            windows = -(-(following.token - mix.token) // self.window_tokens)
            if number < windows:
                return mix.token + number * self.window_tokens
            number -= windows
        return self.mix.mixes[-1].token + number * self.window_tokens

    def _find_cut(self, sequence: int) -> _Cut:
        """Find the document from which another mix begins at a sequence.

        Its window is packed anew from the fewest documents that fill it as far as the sequence. A window that an earlier run
        read, or that ends at an earlier change, stays as it is: then the mix changes at its end.
        """
        number, row = self._find_window(sequence - 1)
        begin, end = self.window_counts[number].documents, self._find_first_document(number + 1)
        is_read = self.packed and self.window_counts[number].sequences < self.start
        is_cut = self._find_window_start(number) < self.mix.mixes[-1].token
        low, high = begin, end
        if not is_read and not is_cut and row + 2 < len(self._get_window(number).offsets):
            while high - low > 1:
                middle = (low + high) // 2
                full = len(self._pack_documents(number, begin, middle).offsets) - 1 > row
                low, high = (low, middle) if full else (middle, high)
        return _Cut(number, high, self._pack_documents(number, begin, high))

    def _get_window(self, number: int) -> PackedWindow:
        if number not in self._windows:
            if len(self._windows) >= MAX_WINDOWS_IN_MEMORY:
                del self._windows[next(iter(self._windows))]
            self._windows[number] = self._plan_window(number)
        return self._windows[number]

    def _plan_window(self, number: int) -> PackedWindow:
        return self._pack_documents(number, self._find_first_document(number), self._find_first_document(number + 1))

    def _pack_documents(self, number: int, begin: int, end: int) -> PackedWindow:
        """Cut the documents of a window into pieces, and pack them."""
        counts = self.mix.build_order().read_counts(begin, end)
        lengths, sizes = counts[:, TOKEN_COLUMN], counts[:, BYTE_COLUMN]
        parts = -(-lengths // self.max_length)
        document = np.repeat(np.arange(end - begin), parts)
        first = (np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)) * self.max_length
        tokens = np.minimum(lengths[document] - first, self.max_length)
        # The bytes of a document before a token, in proportion to the tokens
        bytes_before, bytes_through = (token * sizes[document] // lengths[document] for token in (first, first + tokens))
        if self.packed:
            bins = pack_best_fit(tokens, self.max_length)
            count = int(bins.max(initial=-1)) + 1
            bins = np.random.Generator(np.random.PCG64([self.mix.seed, LAYOUT_FORMAT << 32, number])).permutation(count)[bins]
        else:
            bins, count = np.arange(len(document)), len(document)
        by_bin = np.argsort(bins, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))]).astype(np.int64)
        running = np.zeros((len(document) + 1, 2), np.int64)
        np.cumsum(np.stack([tokens, bytes_through - bytes_before], 1)[by_bin], axis=0, out=running[1:])
        return PackedWindow(np.stack([document + begin, first, tokens], 1)[by_bin], offsets, running[offsets])
