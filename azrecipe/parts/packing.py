"""Documents to training sequences: concatenated, cut to length, and kept from seeing each other.

A document is BOS, its tokens, EOS. `position_ids` restart at each document, which with `use_cache=False` and no
attention mask makes transformers build attention within documents only. No loss is taken on predicting a BOS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from azrecipe.errors import CannotRun
from azrecipe.parts.mixing import Ints, Mix, Order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class Borders:
    """The special tokens around a document; either may be None, not both."""

    bos: int | None
    eos: int | None

    @property
    def count(self) -> int:
        return (self.bos is not None) + (self.eos is not None)


def borders(tokenizer: PreTrainedTokenizerBase) -> Borders:
    """The document borders of a tokenizer. Raises CannotRun where it has neither a BOS nor an EOS token."""
    found = Borders(tokenizer.bos_token_id, tokenizer.eos_token_id)
    if not found.count:
        raise CannotRun("the tokenizer has neither a BOS nor an EOS token, so documents cannot be told apart")
    return found


@dataclass(frozen=True)
class Span:
    """A stretch of a mix: `count` sequences of `max_length` tokens, from token `start` on."""

    start: int
    count: int
    max_length: int


class PackedText(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a span of a mix. Random access, memory-mapped."""

    def __init__(self, mix: Mix, order: Order, marks: Borders, span: Span) -> None:
        self.mix, self.order, self.marks = mix, order, marks
        self.max_length, self.start_token, self.count = span.max_length, span.start, span.count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sequence: input_ids, labels and position_ids, each [max_length] int64."""
        begin = self.start_token + index * self.max_length
        ids = np.empty(self.max_length, dtype=np.int64)
        positions = np.empty(self.max_length, dtype=np.int64)
        at = 0
        nth = int(np.searchsorted(self.order.token_ends, begin, side="right"))
        while at < self.max_length:
            document_start = int(self.order.token_ends[nth - 1]) if nth else 0
            piece = self._document(nth)[begin + at - document_start :][: self.max_length - at]
            ids[at : at + len(piece)] = piece
            positions[at : at + len(piece)] = np.arange(len(piece))
            at += len(piece)
            nth += 1
        labels = ids.copy()
        labels[positions == 0] = IGNORED  # what precedes it is another document
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "position_ids": torch.from_numpy(positions)}

    def _document(self, nth: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        store = self.mix.stores[int(self.order.source[nth])]
        document = int(self.order.document[nth])
        tokens = store.document(document).astype(np.int64)
        before = [] if self.marks.bos is None else [self.marks.bos]
        after = [] if self.marks.eos is None else [self.marks.eos]
        return np.concatenate([np.asarray(before, np.int64), tokens, np.asarray(after, np.int64)])

    def bytes_until(self, sequences: int) -> int:
        """Bytes of text in the first `sequences` sequences; a document that is cut counts in proportion."""
        return bytes_at(self.order, self.start_token + sequences * self.max_length) - bytes_at(self.order, self.start_token)


def bytes_at(order: Order, token: int) -> int:
    """Bytes of text before a position counted in tokens."""
    return round(_interpolate(order.token_ends, order.byte_ends, token))


def token_at(order: Order, size: int) -> int:
    """The position in tokens at which so many bytes of text have been read."""
    return math.ceil(_interpolate(order.byte_ends, order.token_ends, size))


def _interpolate(ends: Ints, others: Ints, at: int) -> float:
    """Read a position on one running count (documents' ends) off on another, linear within a document."""
    nth = min(int(np.searchsorted(ends, at, side="left")), len(ends) - 1)
    start, other = (int(ends[nth - 1]), int(others[nth - 1])) if nth else (0, 0)
    return other + (at - start) / (int(ends[nth]) - start) * (int(others[nth]) - other)


def collate(sequences: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch [sequences, max_length] of each field. No attention mask: the position ids isolate the documents."""
    return {key: torch.stack([s[key] for s in sequences]) for key in sequences[0]}
