"""Documents to training sequences: laid out, and kept from seeing each other.

A document is BOS, its tokens, EOS. `wrapped`: one after the other, cut where a sequence is full. `bfd` and unpacked: see
`best_fit_packing`. `position_ids` restart at each document, which with `use_cache=False` and no attention mask makes
transformers build attention within documents only. No loss is taken on predicting a BOS or padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from azrecipe.data.best_fit_packing import Fitted, Piece
from azrecipe.data.mixture import TOKENS, Ints, Mix
from azrecipe.errors import CannotRun
from azrecipe.tokenization.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from azrecipe.recipe.types import PretrainData


Sequence = dict[str, torch.Tensor]


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
class Packing:
    """How documents become sequences: strategy wrapped, bfd or unpacked; `pad` is the token that fills what is left."""

    strategy: str
    max_length: int
    marks: Borders
    pad: int = 0


def packing(data: PretrainData, tokenizer: PreTrainedTokenizerBase) -> Packing:
    """What a recipe asks for. Padding is the tokenizer's pad token, else its EOS, else its BOS."""
    marks = borders(tokenizer)
    pad = next(token for token in (tokenizer.pad_token_id, marks.eos, marks.bos) if token is not None)
    return Packing(data.packing_strategy if data.packing else "unpacked", data.max_length, marks, pad)


class Wrapped:
    """Sequences of `max_length` tokens each from a token of the order on, documents cut where one is full."""

    def __init__(self, mix: Mix, max_length: int, start: int = 0) -> None:
        self.mix, self.max_length, self.start = mix, max_length, start

    @property
    def fingerprint(self) -> str:
        """A name for these sequences; equal for runs that can continue one another, whatever their `max_length`."""
        return self.mix.fingerprint

    def pieces(self, sequence: int) -> list[Piece]:
        """What stands in a sequence, in order."""
        begin = self.start + sequence * self.max_length
        end = begin + self.max_length
        order = self.mix.order(tokens=end)
        nth, found = order.find(TOKENS, begin, "right"), []
        at = begin
        while at < end:
            start, stop = order.before(nth)[TOKENS], order.before(nth + 1)[TOKENS]
            found.append(Piece(nth, at - start, min(stop, end) - at))
            at, nth = min(stop, end), nth + 1
        return found

    def amount(self, sequences: int) -> tuple[int, int]:
        """Tokens and bytes of text in the first `sequences` sequences; a document that is cut counts in proportion."""
        end = self.start + sequences * self.max_length
        order = self.mix.order(tokens=end)
        return end - self.start, order.bytes_at(end) - order.bytes_at(self.start)

    def reach(self, sequence: int, tokens: int = 0, size: int = 0) -> int:
        """How many sequences from the given one on hold so many tokens and bytes of text; all there are, where they hold less."""
        begin = self.start + sequence * self.max_length
        end = begin + tokens
        if size:
            size += self.mix.order(tokens=begin).bytes_at(begin)
            order = self.mix.order(size=size)
            end = max(end, order.token_at(min(size, order.bytes)))
        wanted = -(-(end - begin) // self.max_length)
        return self.available(sequence + wanted) - sequence

    def available(self, wanted: int) -> int:
        """How many whole sequences there are, up to `wanted`."""
        order = self.mix.order(tokens=self.start + wanted * self.max_length)
        return max(0, min(wanted, (order.tokens - self.start) // self.max_length))

    def begun(self, sequences: int) -> tuple[int, Ints]:
        """The documents of which a part stands before the end of the first `sequences` sequences: so many, and no further ones."""
        end = self.start + sequences * self.max_length
        return self.mix.order(tokens=end).find(TOKENS, end) + 1 if end else 0, np.zeros(0, np.int64)


Layout = Wrapped | Fitted


def layout(mix: Mix, how: Packing, start: int = 0, cache: Path | None = None) -> Layout:
    """The sequences of a mix from `start` on, which counts tokens of the order (wrapped) or sequences (the others)."""
    if how.strategy == "wrapped":
        return Wrapped(mix, how.max_length, start)
    return Fitted(mix, how.max_length, how.strategy == "bfd", start, cache)


class PackedText(Dataset[Sequence]):
    """`count` sequences of a layout from number `first` on. Random access, memory-mapped."""

    def __init__(self, sequences: Layout, how: Packing, first: int, count: int) -> None:
        self.layout, self.how, self.first, self.count = sequences, how, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sequence:
        """One sequence: input_ids, labels and position_ids, each [max_length] int64 (unpacked: [tokens]).

        Padding stands at the end, as a document of its own that no loss is taken on.
        """
        pieces = self.layout.pieces(self.first + index)
        count = sum(piece.tokens for piece in pieces)
        length = count if self.how.strategy == "unpacked" else self.how.max_length
        ids = np.full(length, self.how.pad, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        at = 0
        for piece in pieces:
            ids[at : at + piece.tokens] = self._tokens(piece)
            positions[at : at + piece.tokens] = np.arange(piece.tokens)
            at += piece.tokens
        positions[at:] = np.arange(length - at)
        labels = ids.copy()
        labels[positions == 0] = IGNORED  # what precedes it is another document
        labels[at:] = IGNORED
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "position_ids": torch.from_numpy(positions)}

    def documents_of(self, index: int) -> list[tuple[int, int, int, int]]:
        """What stands in a sequence: source and document within it, first token of the document (BOS is 0), tokens."""
        order = self.layout.mix.order()
        return [
            (int(order.source[piece.nth]), int(order.document[piece.nth]), piece.first, piece.tokens)
            for piece in self.layout.pieces(self.first + index)
        ]

    def _tokens(self, piece: Piece) -> np.ndarray[Any, np.dtype[np.int64]]:
        order = self.layout.mix.order()
        tokens = self.layout.mix.stores[int(order.source[piece.nth])].document(int(order.document[piece.nth]))
        bos, eos = self.how.marks.bos, self.how.marks.eos
        found = np.empty(piece.tokens, np.int64)
        before, at = 0 if bos is None else 1, 0
        if bos is not None and piece.first == 0:
            found[0], at = bos, 1
        inside = tokens[max(piece.first - before, 0) : piece.first + piece.tokens - before]
        found[at : at + len(inside)] = inside
        if eos is not None and at + len(inside) < piece.tokens:
            found[-1] = eos
        return found

    def tokens_until(self, sequences: int) -> int:
        """Tokens in the first `sequences` sequences, BOS and EOS included, padding not."""
        return self._until(sequences)[0]

    def bytes_until(self, sequences: int) -> int:
        """Bytes of text in the first `sequences` sequences; a document that is cut counts in proportion."""
        return self._until(sequences)[1]

    def _until(self, sequences: int) -> tuple[int, int]:
        (tokens, size), (before, size_before) = self.layout.amount(self.first + sequences), self.layout.amount(self.first)
        return tokens - before, size - size_before


@dataclass(frozen=True)
class Collate:
    """Sequences to a batch: [sequences, longest] of each field, or, `flat`, [1, all their tokens].

    No attention mask: the position ids isolate the documents. transformers' flash attention reads them in a batch of one
    row only (`_is_packed_sequence` in its modeling_flash_attention_utils); with more rows, documents would see each
    other. So flash attention takes the flat form, which cuts no corner: a sequence's first label is ignored anyway.
    """

    pad: int
    flat: bool
    multiple: int = 1  # of which a batch's length is, by padding

    def __call__(self, sequences: list[Sequence]) -> Sequence:
        if self.flat:
            return {key: torch.cat([s[key] for s in sequences])[None] for key in sequences[0]}
        longest = -(-max(len(s["input_ids"]) for s in sequences) // self.multiple) * self.multiple
        return {key: torch.stack([self._padded(key, s[key], longest) for s in sequences]) for key in sequences[0]}

    def _padded(self, key: str, row: torch.Tensor, longest: int) -> torch.Tensor:
        """Right padding goes on with the row's positions: nothing looks ahead, and attention needs no mask."""
        missing = longest - len(row)
        if not missing:
            return row
        if key == "position_ids":
            return torch.cat([row, torch.arange(len(row), longest)])
        return torch.nn.functional.pad(row, (0, missing), value=self.pad if key == "input_ids" else IGNORED)


def collate(how: Packing, attn_implementation: str, context: int = 1) -> Collate:
    """How a model with this attention takes its batches; each sequence is split over `context` processes.

    A process of those gets two pieces, one from the front and one from the back, so that all have as much to attend to.
    """
    return Collate(how.pad, flat=attn_implementation.startswith("flash"), multiple=2 * context if context > 1 else 1)
