"""The order of the data: which document comes when, decided once, the same for every machine and number of processes.

Each source is gone through in epochs, each in an order of its own drawn from the seed. The sources are merged by
virtual time: a document starts at (bytes its source gave before it) / (the source's weight), and the earliest start
comes first. So after any number of bytes every source has given its share to within one document, and the order for a
longer run begins with the order for a shorter one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from azrecipe.parts.tokens import Store

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Documents in the order of training, [n] each: source, document within it, tokens and bytes up to its end."""

    source: Ints
    document: Ints
    token_ends: Ints
    byte_ends: Ints


class Mix:
    """Documents of several stores, mixed by `weights` (shares of bytes), reshuffled each epoch with `seed`.

    `extra` is the number of special tokens that packing adds to each document.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float], seed: int, extra: int) -> None:
        self.stores, self.seed, self.extra = stores, seed, extra
        total = sum(weights)
        self.shares = [weight / total for weight in weights]

    @property
    def fingerprint(self) -> str:
        """A name for this order of these data; equal for runs that can continue one another."""
        what = [[s.key for s in self.stores], self.shares, self.seed, self.extra]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    @property
    def epoch_bytes(self) -> int:
        """Bytes of text of all sources together."""
        return sum(store.bytes for store in self.stores)

    def order(self, tokens: int = 0, size: int = 0) -> Order:
        """The order up to at least so many tokens and so many bytes of text."""
        all_tokens = sum(s.count + s.documents * self.extra for s in self.stores)
        horizon = max(size, tokens * self.epoch_bytes / max(all_tokens, 1)) * 1.02 + 1
        while True:
            order = self._until(horizon)
            if order.token_ends[-1] >= tokens and order.byte_ends[-1] >= size:
                return order
            horizon *= 1.25

    def epochs(self, order: Order, tokens: int) -> list[float]:
        """How many times each source is gone through within the first `tokens` tokens."""
        used = int(np.searchsorted(order.token_ends, tokens, side="left")) + 1
        source, document = order.source[:used], order.document[:used]
        return [float(s.sizes[document[source == i]].sum() / s.bytes) for i, s in enumerate(self.stores)]

    def _until(self, horizon: float) -> Order:
        documents, starts, sources = [], [], []
        for i, (store, share) in enumerate(zip(self.stores, self.shares, strict=True)):
            epochs = int(horizon * share // store.bytes) + 1
            order = np.concatenate([self._shuffled(i, epoch, store.documents) for epoch in range(epochs)])
            ends = np.cumsum(store.sizes[order])
            start = (ends - store.sizes[order]) / share
            keep = start <= horizon
            documents.append(order[keep])
            starts.append(start[keep])
            sources.append(np.full(int(keep.sum()), i, dtype=np.int64))
        merged = np.argsort(np.concatenate(starts), kind="stable")
        source, document = np.concatenate(sources)[merged], np.concatenate(documents)[merged]
        lengths, sizes = np.empty(len(source), np.int64), np.empty(len(source), np.int64)
        for i, store in enumerate(self.stores):
            mine = source == i
            lengths[mine] = store.lengths[document[mine]] + self.extra
            sizes[mine] = store.sizes[document[mine]]
        return Order(source, document, np.cumsum(lengths), np.cumsum(sizes))

    def _shuffled(self, source: int, epoch: int, documents: int) -> Ints:
        return np.random.Generator(np.random.PCG64([self.seed, source, epoch])).permutation(documents)
