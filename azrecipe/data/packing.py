"""Lay documents into training sequences and batches.

A document is BOS, its tokens, EOS. The strategy `wrapped` lays documents one after the other and cuts one where a sequence
is full; `best_fit_packing` has the strategies `bfd` and `unpacked`. `position_ids` restart at each document, which with `use_cache=False` and no attention mask makes
transformers build attention within documents only. No loss is taken on predicting a BOS or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from azrecipe.data.best_fit_packing import BestFitLayout, DocumentSpan
from azrecipe.data.mixture import TOKEN_COLUMN, Mixture, TextCounts
from azrecipe.errors import CannotRun
from azrecipe.recipe.attention_kinds import needs_borders
from azrecipe.tokenization.encoding import IGNORE_INDEX
from azrecipe.utils.bootstrap import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from azrecipe.recipe.types import PretrainData

PADDED_MULTIPLE = 64  # of a measured batch's length: cuDNN's attention plans anew for every length, 0.28 s each on an H100

TokenSequence = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DocumentDelimiters:
    """The special tokens around a document; one of them may be None."""

    bos: int | None
    eos: int | None

    @property
    def count(self) -> int:
        return (self.bos is not None) + (self.eos is not None)


def get_delimiters(tokenizer: PreTrainedTokenizerBase) -> DocumentDelimiters:
    """Get the delimiters that a tokenizer has.

    Raises:
        CannotRun: The tokenizer has neither a BOS nor an EOS token.
    """
    delimiters = DocumentDelimiters(tokenizer.bos_token_id, tokenizer.eos_token_id)
    if not delimiters.count:
        raise CannotRun("the tokenizer has neither a BOS nor an EOS token, so nothing separates documents")
    return delimiters


@dataclass(frozen=True)
class Packing:
    """How documents become sequences.

    Attributes:
        strategy: wrapped, bfd or unpacked.
        max_length: The most tokens of a sequence.
        delimiters: The special tokens around a document.
        pad_token_id: The token that fills a sequence up.
    """

    strategy: str
    max_length: int
    delimiters: DocumentDelimiters
    pad_token_id: int = 0


def build_packing(data: PretrainData, tokenizer: PreTrainedTokenizerBase) -> Packing:
    """Build the packing of a recipe.

    Padding is the tokenizer's pad token, else its EOS, else its BOS.
    """
    delimiters = get_delimiters(tokenizer)
    pad = next(token for token in (tokenizer.pad_token_id, delimiters.eos, delimiters.bos) if token is not None)
    return Packing(data.packing_strategy if data.packing else "unpacked", data.max_length, delimiters, pad)


class ConcatLayout:
    """Sequences of `max_length` tokens, documents cut where one is full.

    `start` is the token of the order at which the first sequence begins.
    """

    def __init__(self, mix: Mixture, max_length: int, start: int = 0) -> None:
        self.mix, self.max_length, self.start = mix, max_length, start

    @property
    def fingerprint(self) -> str:
        """A name for these sequences.

        It is equal for runs that can continue one another. It does not depend on `max_length`: the order is cut anywhere.
        """
        return self.mix.fingerprint

    def find_spans(self, sequence: int) -> list[DocumentSpan]:
        """Find the parts of documents in a sequence, in order."""
        token = self.start + sequence * self.max_length
        end = token + self.max_length
        order = self.mix.build_order(tokens=end)
        index, spans = order.find_document(TOKEN_COLUMN, token, "right"), []
        while token < end:
            start, stop = order.counts_before(index).tokens, order.counts_before(index + 1).tokens
            spans.append(DocumentSpan(index, token - start, min(stop, end) - token))
            token, index = min(stop, end), index + 1
        return spans

    def count_text(self, sequences: int) -> TextCounts:
        """Count tokens and bytes of text in the first `sequences` sequences.

        A document that is cut counts in proportion.
        """
        end = self.start + sequences * self.max_length
        order = self.mix.build_order(tokens=end)
        return TextCounts(end - self.start, order.bytes_at(end) - order.bytes_at(self.start))

    def count_sequences(self, first: int, tokens: int = 0, size: int = 0) -> int:
        """Count the sequences, from number `first` on, that hold so much text.

        Args:
            first: The first sequence that counts.
            tokens: The tokens that the sequences hold at least.
            size: The bytes of text that they hold at least.

        Returns:
            The number of sequences; all that there are where they hold less.
        """
        begin = self.start + first * self.max_length
        end = begin + tokens
        if size:
            size += self.mix.build_order(tokens=begin).bytes_at(begin)
            order = self.mix.build_order(size=size)
            end = max(end, order.token_at(min(size, order.bytes)))
        count = -(-(end - begin) // self.max_length)
        return self.count_available(first + count) - first

    def count_available(self, limit: int) -> int:
        """Count the full sequences that there are, up to `limit`."""
        order = self.mix.build_order(tokens=self.start + limit * self.max_length)
        return max(0, min(limit, (order.tokens - self.start) // self.max_length))

    def change_weights(self, sequences: int, weights: Sequence[float]) -> None:
        """Mix with other weights after the first `sequences` sequences.

        The rest of a document that is cut there comes first.
        """
        self.mix.change_weights(self.start + sequences * self.max_length, weights)

    def count_text_before_change(self, first: int, sequences: int) -> TextCounts:
        """Count the text of sequences, as if the mix changed after them.

        Args:
            first: The first sequence that counts.
            sequences: How many count.
        """
        end, begin = self.count_text(first + sequences), self.count_text(first)
        return TextCounts(end.tokens - begin.tokens, end.bytes - begin.bytes)

    def find_started_documents(self, sequences: int) -> tuple[int, IntArray]:
        """Find the documents that begin in or before the first `sequences` sequences.

        Returns:
            How many documents at the beginning of the order these are, and no others (an empty array).
        """
        end = self.start + sequences * self.max_length
        return self.mix.build_order(tokens=end).find_document(TOKEN_COLUMN, end) + 1 if end else 0, np.zeros(0, np.int64)


Layout = ConcatLayout | BestFitLayout


def build_layout(mix: Mixture, packing: Packing, start: int = 0, cache: Path | None = None) -> Layout:
    """Lay a mixture into sequences.

    Args:
        mix: The documents in their order.
        packing: How documents become sequences.
        start: Where the first sequence begins: a token of the order (wrapped), or a sequence (the other strategies).
        cache: A folder for counts that take long to compute.
    """
    if packing.strategy == "wrapped":
        return ConcatLayout(mix, packing.max_length, start)
    return BestFitLayout(mix, packing.max_length, packing.strategy == "bfd", start, cache)


class DocumentPart(NamedTuple):
    """A part of a document in a sequence, with its source.

    Attributes:
        source: The index of the source.
        document: The number of the document within its source.
        first_token: The first token of the part within the document; a BOS counts as token 0.
        num_tokens: The length of the part.
    """

    source: int
    document: int
    first_token: int
    num_tokens: int


class PackedText(Dataset[TokenSequence]):
    """Sequences of a layout, memory-mapped, with random access.

    Args:
        layout: The sequences.
        packing: How documents become sequences.
        first_sequence: The number of the first sequence in the layout.
        num_sequences: How many sequences there are.
    """

    def __init__(self, layout: Layout, packing: Packing, first_sequence: int, num_sequences: int) -> None:
        self.layout, self.packing, self.first_sequence, self.num_sequences = layout, packing, first_sequence, num_sequences

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> TokenSequence:
        """Read a sequence: input_ids, labels and position_ids, each [max_length] int64 (unpacked: [tokens]).

        Padding is at the end, a document of its own that takes no part in the loss.
        """
        spans = self.layout.find_spans(self.first_sequence + index)
        count = sum(span.num_tokens for span in spans)
        length = count if self.packing.strategy == "unpacked" else self.packing.max_length
        ids = np.full(length, self.packing.pad_token_id, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        begin = 0
        for span in spans:
            ids[begin : begin + span.num_tokens] = self._read_tokens(span)
            positions[begin : begin + span.num_tokens] = np.arange(span.num_tokens)
            begin += span.num_tokens
        positions[count:] = np.arange(length - count)
        labels = ids.copy()
        labels[positions == 0] = IGNORE_INDEX  # another document precedes the token
        labels[count:] = IGNORE_INDEX
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "position_ids": torch.from_numpy(positions)}

    def list_documents(self, index: int) -> list[DocumentPart]:
        """List the parts of documents in a sequence, in order."""
        order = self.layout.mix.build_order()
        return [
            DocumentPart(int(order.source[span.index]), int(order.document[span.index]), span.first_token, span.num_tokens)
            for span in self.layout.find_spans(self.first_sequence + index)
        ]

    def _read_tokens(self, span: DocumentSpan) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Read the tokens of a part of a document, delimiters included, [tokens]."""
        order = self.layout.mix.build_order()
        text = self.layout.mix.stores[int(order.source[span.index])].read_document(int(order.document[span.index]))
        bos, eos = self.packing.delimiters.bos, self.packing.delimiters.eos
        tokens = np.empty(span.num_tokens, np.int64)
        num_bos, begin = 0 if bos is None else 1, 0
        if bos is not None and span.first_token == 0:
            tokens[0], begin = bos, 1
        part = text[max(span.first_token - num_bos, 0) : span.first_token + span.num_tokens - num_bos]
        tokens[begin : begin + len(part)] = part
        if eos is not None and begin + len(part) < span.num_tokens:
            tokens[-1] = eos
        return tokens

    def count_tokens(self, sequences: int) -> int:
        """Count the tokens in the first `sequences` sequences.

        BOS and EOS count, padding does not.
        """
        return self._count_text(sequences).tokens

    def count_bytes(self, sequences: int) -> int:
        """Count the bytes of text in the first `sequences` sequences.

        A document that is cut counts in proportion.
        """
        return self._count_text(sequences).bytes

    def _count_text(self, sequences: int) -> TextCounts:
        end, begin = (self.layout.count_text(self.first_sequence + number) for number in (sequences, 0))
        return TextCounts(end.tokens - begin.tokens, end.bytes - begin.bytes)


def compute_document_borders(position_ids: torch.Tensor) -> dict[str, Any]:
    """Compute where documents begin, as arguments of a model's forward.

    They are computed on the host, so that no layer waits for the GPU.

    Args:
        position_ids: [rows, tokens]; each row begins with a document.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [documents + 1] over the rows end to end, and `max_length_q` and `max_length_k`, the
        length of a row, which stays the same from batch to batch.
    """
    starts = (position_ids == 0).reshape(-1)
    starts = starts.clone()
    starts[:: position_ids.shape[1]] = True  # a row begins a document, whatever its positions say
    begins = starts.nonzero().view(-1)
    borders = torch.cat([begins, begins.new_tensor([starts.numel()])]).to(torch.int32)
    length = position_ids.shape[1]
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length}


@dataclass(frozen=True)
class Collator:
    """Join sequences to a batch.

    Each field is [sequences, longest].

    There is no attention mask: the position ids isolate the documents, or their borders do. transformers' flash attention would read
    the position ids in a batch of one row only (`_is_packed_sequence` in its modeling_flash_attention_utils), and wait for the GPU in
    every layer: it gets the borders.

    Attributes:
        pad_token_id: The token that pads a shorter sequence.
        length_multiple: What the length of a batch is a multiple of, by padding.
        with_borders: Whether the model is told where documents begin, as variable-length attention needs it.
    """

    pad_token_id: int
    length_multiple: int = 1
    with_borders: bool = False

    def __call__(self, sequences: list[TokenSequence]) -> dict[str, Any]:
        batch = self._build_batch(sequences)
        return {**batch, **compute_document_borders(batch["position_ids"])} if self.with_borders else batch

    def _build_batch(self, sequences: list[TokenSequence]) -> TokenSequence:
        longest = -(-max(len(s["input_ids"]) for s in sequences) // self.length_multiple) * self.length_multiple
        return {key: torch.stack([self._pad(key, s[key], longest) for s in sequences]) for key in sequences[0]}

    def _pad(self, key: str, row: torch.Tensor, longest: int) -> torch.Tensor:
        """Pad a row on the right.

        Its positions continue, so that attention needs no mask.
        """
        missing = longest - len(row)
        if not missing:
            return row
        if key == "position_ids":
            return torch.cat([row, torch.arange(len(row), longest)])
        return torch.nn.functional.pad(row, (0, missing), value=self.pad_token_id if key == "input_ids" else IGNORE_INDEX)


def build_collator(packing: Packing, attn_implementation: str, context: int = 1) -> Collator:
    """Build the collator for a model's attention.

    With `context` processes to a sequence, each gets one piece from its front and one from its back, so that all have the
    same work.
    """
    return Collator(
        packing.pad_token_id,
        length_multiple=2 * context if context > 1 else 1,
        with_borders=needs_borders(attn_implementation),
    )


def get_padded_length(model: PreTrainedModel, longest: int) -> int:
    """Get a batch's length: a multiple of PADDED_MULTIPLE within the model's positions.

    cuDNN plans its attention anew for every length that it has not seen.

    Args:
        model: The model that the batch is for.
        longest: Tokens of the batch's longest row.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or longest
    return max(longest, min(-(-longest // PADDED_MULTIPLE) * PADDED_MULTIPLE, limit))


def get_length_multiple(model: PreTrainedModel, device_type: str) -> int:
    """Get what the length of a training batch is a multiple of.

    On a GPU it is PADDED_MULTIPLE, unless a batch could then be longer than the model's positions.

    Args:
        model: The model.
        device_type: `cuda`, `cpu` or another of PyTorch's.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    return PADDED_MULTIPLE if device_type == "cuda" and positions % PADDED_MULTIPLE == 0 else 1
