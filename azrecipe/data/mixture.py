"""The order of the data: which document comes when, decided once, the same for every machine and number of processes.

Each source is gone through in epochs, each in an order of its own drawn from the seed. The sources are merged by
virtual time: a document starts at (bytes its source gave before it) / (the source's share), and the earliest start
comes first. So after any number of bytes every source has given its share to within one document, and the order for a
longer run begins with the order for a shorter one. A source that is not begun again leaves, and the others keep their
shares among themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.token_store import Store

Ints = npt.NDArray[np.int64]
BLOCK = 4096  # documents between two running counts that an order keeps; those between are counted when asked for
SLICE = 1_000_000  # documents merged at a time
TOKENS, BYTES = 0, 1  # columns of what is counted


@dataclass(frozen=True)
class Order:
    """Documents in the order of training, [n] each: source, document within it. 5 bytes a document with few sources.

    `marks` [⌈n / BLOCK⌉ + 1, 2] int64: tokens (the specials that packing adds included) and bytes before each BLOCK-th
    document, and of all.
    """

    mix: Mix
    source: npt.NDArray[Any]
    document: npt.NDArray[Any]
    marks: Ints
    _held: dict[int, Ints] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        return int(self.marks[-1, TOKENS])

    @property
    def bytes(self) -> int:
        return int(self.marks[-1, BYTES])

    def counts(self, begin: int, end: int) -> Ints:
        """Tokens and bytes of the documents from `begin` to before `end`: [end - begin, 2]."""
        return self.mix.counts(self.source[begin:end], self.document[begin:end])

    def before(self, nth: int) -> tuple[int, int]:
        """Tokens and bytes before the nth document."""
        if nth == 0:
            return 0, 0
        ends = self._ends((nth - 1) // BLOCK)[(nth - 1) % BLOCK]
        return int(ends[TOKENS]), int(ends[BYTES])

    def find(self, column: int, at: int, side: Any = "left") -> int:
        """The first document that ends at or behind a position (`side` right: behind it); their number where none does."""
        block = int(np.searchsorted(self.marks[1:, column], at, side=side))
        if block + 1 >= len(self.marks):
            return len(self)
        return block * BLOCK + int(np.searchsorted(self._ends(block)[:, column], at, side=side))

    def bytes_at(self, token: int) -> int:
        """Bytes of text before a position counted in tokens; a document that is cut counts in proportion."""
        return round(self._interpolate(TOKENS, token))

    def token_at(self, size: int) -> int:
        """The position in tokens at which so many bytes of text have been read."""
        return math.ceil(self._interpolate(BYTES, size))

    def _interpolate(self, column: int, at: int) -> float:
        """Read a position on one running count off on the other, linear within a document."""
        nth = min(self.find(column, at), len(self) - 1)
        start, end = self.before(nth), self.before(nth + 1)
        other = 1 - column
        return start[other] + (at - start[column]) / (end[column] - start[column]) * (end[other] - start[other])

    def _ends(self, block: int) -> Ints:
        """Running counts at the end of each document of a block."""
        if block not in self._held:
            if len(self._held) > 8:
                self._held.clear()
            begin = block * BLOCK
            self._held[block] = self.marks[block] + np.cumsum(self.counts(begin, min(begin + BLOCK, len(self))), axis=0)
        return self._held[block]


class Mix:
    """Documents of several stores, mixed by `weights` (shares of bytes), reshuffled each epoch with `seed`.

    `extra` is the number of special tokens that packing adds to each document. `limits`: how many times each source is
    gone through before it leaves the mix (a part of an epoch is its beginning); None: for ever.
    """

    def __init__(
        self, stores: Sequence[Store], weights: Sequence[float], seed: int, extra: int, limits: Sequence[float] | None = None
    ) -> None:
        self.stores, self.seed, self.extra, self.limits = stores, seed, extra, limits
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self._counts = [_counts(store, extra) for store in stores]
        self._queues = [_Queue(self, i) for i in range(len(stores))]
        self._time, self._marks, self._counted = 0.0, [np.zeros((1, 2), np.int64)], np.zeros(2, np.int64)
        document = np.int32 if max(store.documents for store in stores) < 2**31 else np.int64
        self._order = Order(self, np.zeros(0, np.min_scalar_type(len(stores))), np.zeros(0, document), self._marks[0])

    @property
    def fingerprint(self) -> str:
        """A name for this order of these data; equal for runs that can continue one another."""
        what: list[Any] = [[s.key for s in self.stores], self.shares, self.seed, self.extra]
        if self.limits is not None:
            what.append(list(self.limits))
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    @property
    def epoch_bytes(self) -> int:
        """Bytes of text of all sources together."""
        return sum(store.bytes for store in self.stores)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all sources together, the specials that packing adds included."""
        return sum(store.count + store.documents * self.extra for store in self.stores)

    def counts(self, source: npt.NDArray[Any], document: npt.NDArray[Any]) -> Ints:
        """Tokens and bytes of documents: [n, 2]."""
        found = np.empty(len(source), np.uint64)
        for i, counts in enumerate(self._counts):
            mine = source == i
            found[mine] = counts.take(document[mine])
        return found.view(np.uint32).reshape(-1, 2).astype(np.int64)

    def order(self, tokens: int = 0, size: int = 0) -> Order:
        """The order up to at least so many tokens and bytes of text, or, with `limits`, to its end where that is nearer.

        What an earlier call has made is kept: the order may be longer than what is asked for.
        """
        made = self._order
        if made.tokens >= tokens and made.bytes >= size and len(made):
            return made
        horizon = max(size, tokens * self.epoch_bytes / max(self.epoch_tokens, 1)) * 1.02 + 1
        sources, documents = [made.source], [made.document]
        pace = sum(share * store.documents / store.bytes for share, store in zip(self.shares, self.stores, strict=True))
        while (self._counted[TOKENS] < tokens or self._counted[BYTES] < size or not self._counted[TOKENS]) and not self.ended:
            target = horizon if horizon > self._time else self._time * 1.25
            self._time = min(target, self._time + SLICE / pace)
            source, document = self._slice(made.source.dtype, made.document.dtype)
            self._count(source, document, sum(map(len, sources)))
            sources.append(source)
            documents.append(document)
        for queue in self._queues:
            queue.rest()
        count, marks = sum(map(len, sources)), np.concatenate(self._marks)
        marks = marks if count % BLOCK == 0 else np.concatenate([marks, self._counted[None]])
        self._order = Order(self, np.concatenate(sources), np.concatenate(documents), marks)
        return self._order

    @property
    def ended(self) -> bool:
        """Whether the order that has been made holds all that the sources may give."""
        return all(queue.ended for queue in self._queues)

    def epochs(self, order: Order, begun: int, further: Ints | None = None) -> list[float]:
        """How many times each source is gone through in the first `begun` documents and the `further` ones [n] of an order."""
        read = np.zeros(len(self.stores))
        parts: list[Any] = [slice(at, min(at + SLICE, begun)) for at in range(0, begun, SLICE)]
        for part in parts if further is None else [*parts, further]:
            source, document = order.source[part], order.document[part]
            read += np.bincount(source, self.counts(source, document)[:, BYTES], minlength=len(read))
        return [float(size / store.bytes) for size, store in zip(read, self.stores, strict=True)]

    def _slice(self, source: Any, document: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The documents that start before the present time and have not been given yet, in order."""
        taken = [queue.take(self._time) for queue in self._queues]
        merged = np.argsort(np.concatenate([starts for _, starts in taken]), kind="stable")
        sources = np.repeat(np.arange(len(taken), dtype=source), [len(starts) for _, starts in taken])
        return sources[merged], np.concatenate([documents for documents, _ in taken]).astype(document)[merged]

    def _count(self, source: npt.NDArray[Any], document: npt.NDArray[Any], before: int) -> None:
        """Keep the running counts at the ends of the blocks that end among these documents."""
        if len(source):
            ends = self._counted + np.cumsum(self.counts(source, document), axis=0)
            self._marks.append(ends[BLOCK - 1 - before % BLOCK :: BLOCK].copy())  # a view would hold them all
            self._counted = ends[-1].copy()


def _counts(store: Store, extra: int) -> npt.NDArray[np.uint64]:
    """Tokens and bytes of each document [documents], each pair in 8 bytes: they are read at random, three times as fast."""
    counts = np.stack([store.lengths + extra, store.sizes], axis=1)
    assert counts.max() < 2**32  # no tokenizer reads a document of 4 GiB
    return counts.astype(np.uint32).view(np.uint64)[:, 0]


class _Queue:
    """One source's documents, epoch after epoch, each with the virtual time at which it starts."""

    def __init__(self, mix: Mix, nth: int) -> None:
        self.store, self.share, self.key = mix.stores[nth], mix.shares[nth], [mix.seed, nth]
        self.limit = math.inf if mix.limits is None else mix.limits[nth] * self.store.bytes
        self.epoch = self.at = 0
        self.rest()

    @property
    def ended(self) -> bool:
        return self.epoch * self.store.bytes >= self.limit

    def rest(self) -> None:
        """Let go of the epoch's order; it is made again when it is asked for."""
        self.documents: npt.NDArray[Any] | None = None
        self.starts = np.zeros(0)

    def take(self, until: float) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
        """Documents [n] that start before a time, and when they do. Those taken before are left out."""
        documents, starts = [np.zeros(0, np.int64)], [np.zeros(0)]
        while not self.ended:
            if self.documents is None:
                self._shuffle()
            assert self.documents is not None
            end = max(self.at, int(np.searchsorted(self.starts, until, side="left")))
            documents.append(self.documents[self.at : end])
            starts.append(self.starts[self.at : end])
            self.at = end
            if end < len(self.documents):
                break
            self.epoch, self.at, self.documents = self.epoch + 1, 0, None
        return np.concatenate(documents), np.concatenate(starts)

    def _shuffle(self) -> None:
        documents = np.random.Generator(np.random.PCG64([*self.key, self.epoch])).permutation(self.store.documents)
        sizes = self.store.sizes[documents]
        begins = np.cumsum(sizes)
        begins += self.epoch * self.store.bytes - sizes
        if begins[-1] >= self.limit:
            begins = begins[: int(np.searchsorted(begins, self.limit, side="left"))]
        self.documents, self.starts = documents[: len(begins)], begins / self.share


def temperature_weights(stores: Sequence[Store], temperature: float) -> list[float]:
    """Weights in proportion to bytes ** (1 / temperature), the largest 1; to 12 digits, the same on every machine."""
    largest = max(store.bytes for store in stores)
    return [float(f"{(store.bytes / largest) ** (1 / temperature):.12g}") for store in stores]
