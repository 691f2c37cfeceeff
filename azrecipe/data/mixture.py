"""Mix the documents of several sources into one order.

The order is the same on every machine and for every number of processes. Each source is read in epochs, and each epoch has
an order of its own, drawn from the seed. The sources are merged by virtual time: a document starts at (bytes of its source
before it) / (share of the source), and the earliest start comes first. So after any number of bytes every source has
contributed its share to within one document, and the order for a longer run begins with the order for a shorter one. A
source that is read for the last time leaves, and the others keep their shares among themselves. The shares may change at
a document: virtual time begins anew there, and each source goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from azrecipe.data.token_store import TokenStore
from azrecipe.utils.bootstrap import IntArray

BLOCK_DOCUMENTS = 4096  # documents between two stored running counts; counts in between are computed on demand
MAX_BLOCKS_IN_MEMORY = 8
SLICE_DOCUMENTS = 1_000_000  # documents merged at a time
TOKEN_COLUMN, BYTE_COLUMN = 0, 1  # the columns of arrays of counts, and the fields of TextCounts


class TextCounts(NamedTuple):
    """An amount of text, in tokens and in bytes of UTF-8."""

    tokens: int
    bytes: int


@dataclass(frozen=True)
class Mix:
    """The weights of the sources from a point of the order on.

    Attributes:
        token: The tokens before the first document that they hold for.
        weights: The weight of each source; they need not add up to 1.
    """

    token: int
    weights: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        total = sum(self.weights)
        return [weight / total for weight in self.weights]


@dataclass(frozen=True)
class DocumentOrder:
    """Documents in the order of training.

    With few sources it takes 5 bytes a document.

    Attributes:
        mix: The mixture that the order is of.
        source: The source of each document, [documents].
        document: The number of each document within its source, [documents].
        block_counts: [blocks + 1, 2] int64, tokens (with the special tokens that packing adds) and bytes before each
            block of BLOCK_DOCUMENTS documents, and of all.
    """

    mix: Mixture
    source: npt.NDArray[Any]
    document: npt.NDArray[Any]
    block_counts: IntArray
    _blocks: dict[int, IntArray] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        return int(self.block_counts[-1, TOKEN_COLUMN])

    @property
    def bytes(self) -> int:
        return int(self.block_counts[-1, BYTE_COLUMN])

    def read_counts(self, begin: int, end: int) -> IntArray:
        """Read the tokens and bytes of some documents, [end - begin, 2]."""
        return self.mix.read_counts(self.source[begin:end], self.document[begin:end])

    def counts_before(self, index: int) -> TextCounts:
        """Count tokens and bytes before a document."""
        if index == 0:
            return TextCounts(0, 0)
        counts = self._count_through_block((index - 1) // BLOCK_DOCUMENTS)[(index - 1) % BLOCK_DOCUMENTS]
        return TextCounts(int(counts[TOKEN_COLUMN]), int(counts[BYTE_COLUMN]))

    def find_document(self, column: int, position: int, side: Literal["left", "right"] = "left") -> int:
        """Find the first document that ends at or after a position.

        Args:
            column: What the position counts, TOKEN_COLUMN or BYTE_COLUMN.
            position: Tokens or bytes from the beginning of the order.
            side: "right" for the first document that ends after the position.

        Returns:
            The document's index in the order; the number of documents where none ends there.
        """
        block = int(np.searchsorted(self.block_counts[1:, column], position, side=side))
        if block + 1 >= len(self.block_counts):
            return len(self)
        return block * BLOCK_DOCUMENTS + int(np.searchsorted(self._count_through_block(block)[:, column], position, side=side))

    def bytes_at(self, token: int) -> int:
        """Count the bytes before a position in tokens.

        A document that is cut counts in proportion.
        """
        return round(self._interpolate(TOKEN_COLUMN, token))

    def token_at(self, size: int) -> int:
        """Find the position in tokens after `size` bytes of text."""
        return math.ceil(self._interpolate(BYTE_COLUMN, size))

    def _interpolate(self, column: int, position: int) -> float:
        """Convert tokens to bytes or bytes to tokens, linearly within a document."""
        index = min(self.find_document(column, position), len(self) - 1)
        start, end = self.counts_before(index), self.counts_before(index + 1)
        other = 1 - column
        return start[other] + (position - start[column]) / (end[column] - start[column]) * (end[other] - start[other])

    def _count_through_block(self, block: int) -> IntArray:
        """Compute the counts through each document of a block, [documents, 2]."""
        if block not in self._blocks:
            if len(self._blocks) > MAX_BLOCKS_IN_MEMORY:
                self._blocks.clear()
            begin = block * BLOCK_DOCUMENTS
            self._blocks[block] = self.block_counts[block] + np.cumsum(
                self.read_counts(begin, min(begin + BLOCK_DOCUMENTS, len(self))), axis=0
            )
        return self._blocks[block]


class Mixture:
    """Documents of several stores, mixed by weight, each epoch shuffled anew.

    Args:
        stores: The tokenised sources.
        weights: The share of each source, in bytes; they need not add up to 1.
        seed: What the order of each epoch is drawn from.
        specials_per_document: The special tokens that packing adds to each document.
        max_epochs: How many times each source is read before it leaves the mixture; a part of an epoch is its
            beginning. None: without end.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        seed: int,
        specials_per_document: int,
        max_epochs: Sequence[float] | None = None,
    ) -> None:
        self.stores, self.seed, self.specials_per_document, self.max_epochs = stores, seed, specials_per_document, max_epochs
        self.mixes = [Mix(0, tuple(weights))]
        self._document_counts = [_count_documents(store, specials_per_document) for store in stores]
        self._queues = [_Queue(self, i) for i in range(len(stores))]
        self._time, self._block_counts, self._total = 0.0, [np.zeros((1, 2), np.int64)], np.zeros(2, np.int64)
        self._bytes_before_mix = 0
        document = np.int32 if max(store.num_documents for store in stores) < 2**31 else np.int64
        self._order = DocumentOrder(self, np.zeros(0, np.min_scalar_type(len(stores))), np.zeros(0, document), self._block_counts[0])

    @property
    def shares(self) -> list[float]:
        """The share of each source where the order ends."""
        return self.mixes[-1].shares

    @property
    def fingerprint(self) -> str:
        """A name for this order of these documents.

        It is equal for runs that can continue one another.
        """
        settings: list[Any] = [[s.key for s in self.stores], self.mixes[0].shares, self.seed, self.specials_per_document]
        if self.max_epochs is not None:
            settings.append(list(self.max_epochs))
        if len(self.mixes) > 1:
            settings.append({"mixes": [[mix.token, mix.shares] for mix in self.mixes[1:]]})
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    @property
    def epoch_bytes(self) -> int:
        """Bytes of text of all sources together."""
        return sum(store.num_bytes for store in self.stores)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all sources together, with the special tokens that packing adds."""
        return sum(store.num_tokens + store.num_documents * self.specials_per_document for store in self.stores)

    def read_counts(self, source: npt.NDArray[Any], document: npt.NDArray[Any]) -> IntArray:
        """Read the tokens and bytes of documents, [documents, 2]."""
        all_counts = np.empty(len(source), np.uint64)
        for i, counts in enumerate(self._document_counts):
            mine = source == i
            all_counts[mine] = counts.take(document[mine])
        return all_counts.view(np.uint32).reshape(-1, 2).astype(np.int64)

    def has_shares(self, weights: Sequence[float]) -> bool:
        """Whether weights say the shares that hold where the order ends."""
        return all(math.isclose(a, b) for a, b in zip(Mix(0, tuple(weights)).shares, self.shares, strict=True))

    def change_weights(self, token: int, weights: Sequence[float]) -> None:
        """Mix with other weights from a point of the order on.

        What the order has behind that point is given back to its sources. The point is not before that of the last change.

        Args:
            token: The tokens before the point; the first document that begins there or after it is the first of the new mix.
            weights: The weight of each source from there on; 0: it is not read.
        """
        order = self.build_order(tokens=token)
        index = min(order.find_document(TOKEN_COLUMN, token) + 1, len(order)) if token else 0
        before = order.counts_before(index)
        if before.tokens == self.mixes[-1].token:
            self.mixes.pop()  # not a document was read in that mix
        self.mixes.append(Mix(before.tokens, tuple(weights)))
        full_blocks = order.block_counts[: index // BLOCK_DOCUMENTS + 1].copy()
        self._time, self._block_counts, self._total = 0.0, [full_blocks], np.array(before, np.int64)
        self._bytes_before_mix = before.bytes
        read = np.bincount(order.source[:index], minlength=len(self.stores))
        for queue, documents, share in zip(self._queues, read.tolist(), self.shares, strict=True):
            queue.restart(documents, share)
        block_counts = np.concatenate([full_blocks, self._total[None]]) if index % BLOCK_DOCUMENTS else full_blocks
        self._order = DocumentOrder(self, order.source[:index].copy(), order.document[:index].copy(), block_counts)

    def build_order(self, tokens: int = 0, size: int = 0) -> DocumentOrder:
        """Extend the order to at least so much text.

        With `max_epochs` it may end before.

        Only `change_weights` shortens the order: it may be longer than this call needs.

        Args:
            tokens: The tokens that the order holds at least.
            size: The bytes of text that it holds at least.
        """
        order = self._order
        if order.tokens >= tokens and order.bytes >= size and len(order):
            return order
        tokens_in_mix, bytes_in_mix = tokens - self.mixes[-1].token, size - self._bytes_before_mix
        horizon = max(bytes_in_mix, tokens_in_mix * self.epoch_bytes / max(self.epoch_tokens, 1)) * 1.02 + 1
        sources, documents = [order.source], [order.document]
        pace = sum(share * store.num_documents / store.num_bytes for share, store in zip(self.shares, self.stores, strict=True))
        while (self._total[TOKEN_COLUMN] < tokens or self._total[BYTE_COLUMN] < size or not self._total[TOKEN_COLUMN]) and not self.ended:
            target = horizon if horizon > self._time else self._time * 1.25
            self._time = min(target, self._time + SLICE_DOCUMENTS / pace)
            source, document = self._take_slice(order.source.dtype, order.document.dtype)
            self._store_counts(source, document, sum(map(len, sources)))
            sources.append(source)
            documents.append(document)
        for queue in self._queues:
            queue.free()
        count, block_counts = sum(map(len, sources)), np.concatenate(self._block_counts)
        block_counts = block_counts if count % BLOCK_DOCUMENTS == 0 else np.concatenate([block_counts, self._total[None]])
        self._order = DocumentOrder(self, np.concatenate(sources), np.concatenate(documents), block_counts)
        return self._order

    @property
    def ended(self) -> bool:
        """Whether the order holds all that the epochs allow."""
        return all(queue.ended for queue in self._queues if queue.share)

    def count_epochs(self, order: DocumentOrder, count: int, others: IntArray | None = None) -> list[float]:
        """Count how many times a part of an order reads each source.

        Args:
            order: The order.
            count: The documents at its beginning that are read.
            others: The indices of further documents that are read.
        """
        read = np.zeros(len(self.stores))
        parts: list[Any] = [slice(begin, min(begin + SLICE_DOCUMENTS, count)) for begin in range(0, count, SLICE_DOCUMENTS)]
        for part in parts if others is None else [*parts, others]:
            source, document = order.source[part], order.document[part]
            read += np.bincount(source, self.read_counts(source, document)[:, BYTE_COLUMN], minlength=len(read))
        return [float(size / store.num_bytes) for size, store in zip(read, self.stores, strict=True)]

    def _take_slice(self, source: Any, document: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Take the documents that start before the present time, in order."""
        runs = [queue.take(self._time) for queue in self._queues]
        merged = np.argsort(np.concatenate([starts for _, starts in runs]), kind="stable")
        sources = np.repeat(np.arange(len(runs), dtype=source), [len(starts) for _, starts in runs])
        return sources[merged], np.concatenate([documents for documents, _ in runs]).astype(document)[merged]

    def _store_counts(self, source: npt.NDArray[Any], document: npt.NDArray[Any], before: int) -> None:
        """Store the running counts of the blocks that end among these documents."""
        if len(source):
            # A copy, since a view would keep all counts in memory
            ends = self._total + np.cumsum(self.read_counts(source, document), axis=0)
            self._block_counts.append(ends[BLOCK_DOCUMENTS - 1 - before % BLOCK_DOCUMENTS :: BLOCK_DOCUMENTS].copy())
            self._total = ends[-1].copy()


def _count_documents(store: TokenStore, extra: int) -> npt.NDArray[np.uint64]:
    """Count the tokens and bytes of each document, [documents].

    Each pair lies in 8 bytes, since random access is then three times as fast.
    """
    counts = np.stack([store.lengths + extra, store.sizes], axis=1)
    assert counts.max() < 2**32  # no tokenizer reads a document of 4 GiB
    return counts.astype(np.uint32).view(np.uint64)[:, 0]


class _Queue:
    """One source's documents, epoch after epoch, each with its virtual time."""

    def __init__(self, mix: Mixture, index: int) -> None:
        self.store, self.share, self.key = mix.stores[index], mix.shares[index], [mix.seed, index]
        self.limit = math.inf if mix.max_epochs is None else mix.max_epochs[index] * self.store.num_bytes
        self.restart(0, self.share)

    def restart(self, documents: int, share: float) -> None:
        """Go on after so many documents, with time 0 there."""
        self.share = share
        self.epoch, self.position = divmod(documents, self.store.num_documents)
        self.bytes_before = self.epoch * self.store.num_bytes  # of this source, at time 0
        if self.position:
            self.bytes_before += int(self.store.sizes[self._permute_documents()[: self.position]].sum())
        self.free()

    @property
    def ended(self) -> bool:
        return self.epoch * self.store.num_bytes >= self.limit

    def free(self) -> None:
        """Free the memory of the epoch's order, which can be drawn again."""
        self.documents: npt.NDArray[Any] | None = None
        self.starts = np.zeros(0)

    def take(self, until: float) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
        """Take the next documents that start before a time.

        Returns their numbers and times, [documents] each.
        """
        documents, starts = [np.zeros(0, np.int64)], [np.zeros(0)]
        while self.share and not self.ended:
            if self.documents is None:
                self._shuffle()
            assert self.documents is not None
            end = max(self.position, int(np.searchsorted(self.starts, until, side="left")))
            documents.append(self.documents[self.position : end])
            starts.append(self.starts[self.position : end])
            self.position = end
            if end < len(self.documents):
                break
            self.epoch, self.position, self.documents = self.epoch + 1, 0, None
        return np.concatenate(documents), np.concatenate(starts)

    def _permute_documents(self) -> npt.NDArray[Any]:
        """Draw the order of the present epoch."""
        return np.random.Generator(np.random.PCG64([*self.key, self.epoch])).permutation(self.store.num_documents)

    def _shuffle(self) -> None:
        documents = self._permute_documents()
        sizes = self.store.sizes[documents]
        starts = np.cumsum(sizes)
        starts += self.epoch * self.store.num_bytes - sizes
        if starts[-1] >= self.limit:
            starts = starts[: int(np.searchsorted(starts, self.limit, side="left"))]
        self.documents, self.starts = documents[: len(starts)], (starts - self.bytes_before) / self.share


def compute_temperature_weights(stores: Sequence[TokenStore], temperature: float) -> list[float]:
    """Compute weights in proportion to bytes ** (1 / temperature).

    The largest is 1.

    They are rounded to 12 digits, so that they are the same on every machine.
    """
    largest = max(store.num_bytes for store in stores)
    return [float(f"{(store.num_bytes / largest) ** (1 / temperature):.12g}") for store in stores]
