"""Bits per byte: how well a model predicts text, for any tokenizer.

BPB = (sum of -ln p over the tokens of the text) / (ln 2 x UTF-8 bytes of the text), with sums over the whole set. All tokens of a
document are scored. BOS (or EOS where there is none) is context and is not scored, and no EOS is expected at the end. A document
longer than the model's window is scored in windows that overlap by half. Each token is scored once, with at least half a window
before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CannotRun
from azrecipe.evaluation.likelihood import pad_batch
from azrecipe.evaluation.token_losses import compute_token_losses
from azrecipe.tokenization.encoding import IGNORE_INDEX, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoringWindow:
    """A part of a document; its first `num_context` tokens are not scored."""

    ids: list[int]
    num_context: int


@dataclass(frozen=True)
class TextScore:
    """The score of a set of documents.

    `nats` sums -ln p of all scored tokens, and `num_bytes` counts the UTF-8 text. `document_nats` and `document_tokens`, tensors
    [documents], have the sums of each document.
    """

    nats: float
    num_bytes: int
    num_tokens: int
    document_nats: torch.Tensor
    document_tokens: torch.Tensor

    @property
    def bits_per_byte(self) -> float:
        """The bits per byte of the whole set."""
        return self.nats / (math.log(2) * self.num_bytes)


def split_windows(ids: list[int], first_token: int, max_length: int) -> Iterator[ScoringWindow]:
    """Split one document into windows of at most `max_length` tokens.

    `first_token` is the token that precedes the document.
    """
    tokens = [first_token, *ids]
    yield ScoringWindow(tokens[:max_length], 1)
    stride = max(max_length // 2, 1)
    num_scored = max_length
    while num_scored < len(tokens):
        end = min(num_scored + stride, len(tokens))
        start = max(end - max_length, 0)
        yield ScoringWindow(tokens[start:end], num_scored - start)
        num_scored = end


class TextScorer:
    """Scores documents with models of one tokenizer; tokenises them once.

    Args:
        tokenizer: The tokenizer.
        texts: The documents.
        max_length: Tokens in a window at most, and never more than the model's positions.
        batch_size: Windows in a forward pass.

    Raises:
        CannotRun: The tokenizer has neither a BOS nor an EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int) -> None:
        first_token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first_token is None:
            raise CannotRun("the tokenizer has neither a BOS nor an EOS token: the first token of a document cannot be scored")
        self.first_token, self.max_length, self.batch_size = first_token, max_length, batch_size
        self.num_bytes = sum(len(text.encode()) for text in texts)
        self.encoded = encode_texts(tokenizer, texts)

    def score(self, model: PreTrainedModel) -> TextScore:
        """Score the documents with a model.

        In a distributed run the processes share the work, and all get the sum. Every process runs the same number of forward passes, as
        sharded models need. The model's mode (train or eval) is kept.
        """
        limit = min(self.max_length, getattr(model.config, "max_position_embeddings", None) or self.max_length)
        scored_windows = [
            (window, document) for document, ids in enumerate(self.encoded) for window in split_windows(ids, self.first_token, limit)
        ]
        scored_windows.sort(key=lambda pair: len(pair[0].ids))  # less padding; the sum does not depend on the order
        rank, world_size = _get_rank_and_size()
        batches = [scored_windows[i : i + self.batch_size] for i in range(0, len(scored_windows), self.batch_size)]
        rounds = math.ceil(len(batches) / world_size)
        was_training = model.training
        model.eval()
        nats = torch.zeros(1 + len(self.encoded), dtype=torch.float64)  # of all documents, then of each
        with torch.no_grad():
            for i in range(rounds):
                batch_index = i * world_size + rank
                batch = batches[batch_index if batch_index < len(batches) else 0]
                scores = _score_batch(model, [window for window, _ in batch])
                if batch_index < len(batches):
                    nats[0] += scores.sum()
                    nats.index_add_(0, torch.tensor([1 + document for _, document in batch]), scores)
        model.train(was_training)
        total = _all_reduce_sum(nats.to(model.device) if model.device.type == "cuda" else nats).cpu()
        tokens = torch.tensor([len(ids) for ids in self.encoded])
        return TextScore(float(total[0]), self.num_bytes, int(tokens.sum()), total[1:], tokens)


def score_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int
) -> TextScore:
    """Score documents with a model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: The documents.
        max_length: Tokens in a window at most, and never more than the model's positions.
        batch_size: Windows in a forward pass.

    Raises:
        CannotRun: The tokenizer has neither a BOS nor an EOS token.
    """
    return TextScorer(tokenizer, texts, max_length, batch_size).score(model)


def _score_batch(model: PreTrainedModel, batch: list[ScoringWindow]) -> torch.Tensor:
    """Sum -ln p over the scored tokens of each window, float64 [windows].

    Padding is at the end, where no token attends to it.
    """
    labels = [[IGNORE_INDEX] * window.num_context + window.ids[window.num_context :] for window in batch]
    padded = pad_batch(model, [window.ids for window in batch], labels)
    positions = torch.arange(padded.ids.shape[1], device=model.device).expand_as(padded.ids)
    return compute_token_losses(model, padded.ids, padded.labels, position_ids=positions).sum(1).cpu()


def _get_rank_and_size() -> tuple[int, int]:
    """Get this process' rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if _get_rank_and_size()[1] > 1:
        torch.distributed.all_reduce(value)
    return value
