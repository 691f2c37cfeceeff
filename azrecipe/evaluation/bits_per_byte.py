"""Bits per byte: how well a model predicts text, in a unit that does not depend on its tokenizer.

BPB = (sum of -ln p over the tokens of the text) / (ln 2 x UTF-8 bytes of the text), sums over the whole set. A
document is scored whole: BOS (or, where there is none, EOS) is context and not scored, no EOS is asked for. A
document longer than the model's window is scored in windows that overlap by half, each token once, with at least half
a window before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from azrecipe.errors import CannotRun
from azrecipe.modeling import chunked_loss
from azrecipe.tokenization.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """A stretch of a document: token ids, and how many of the first are context only."""

    ids: list[int]
    context: int


@dataclass(frozen=True)
class Bits:
    """A sum over a set of documents: nats of all scored tokens, bytes of UTF-8 text, tokens scored.

    `of_documents`, of each document by itself: nats and tokens, both [documents]. Nats are 0 where the model takes its loss in chunks.
    """

    nats: float
    bytes: int
    tokens: int
    of_documents: tuple[torch.Tensor, torch.Tensor]

    @property
    def per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)


def windows(ids: list[int], first: int, max_length: int) -> Iterator[Window]:
    """Cut one document into windows of at most `max_length` tokens; `first` is the token that precedes it."""
    whole = [first, *ids]
    yield Window(whole[:max_length], 1)
    stride = max(max_length // 2, 1)
    scored = max_length
    while scored < len(whole):
        end = min(scored + stride, len(whole))
        start = max(end - max_length, 0)
        yield Window(whole[start:end], scored - start)
        scored = end


def bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int) -> Bits:
    """Score documents with a model. In a distributed run the processes share the work and all get the sum.

    Every process runs the same number of forward passes, as sharded models need. The model's mode is kept.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise CannotRun("the tokenizer has neither a BOS nor an EOS token: the first token of a document cannot be scored")
    limit = getattr(model.config, "max_position_embeddings", None) or max_length
    encoded = encode(tokenizer, texts)
    pieces = [(window, nth) for nth, ids in enumerate(encoded) for window in windows(ids, first, min(max_length, limit))]
    pieces.sort(key=lambda piece: len(piece[0].ids))  # less padding; the sum does not depend on the order
    rank, world = _position()
    batches = [pieces[i : i + batch_size] for i in range(0, len(pieces), batch_size)]
    rounds = math.ceil(len(batches) / world)
    was_training = model.training
    model.eval()
    nats = torch.zeros(1 + len(texts), dtype=torch.float64)  # of all, then of each document
    with torch.no_grad():
        for i in range(rounds):
            nth = i * world + rank
            batch = batches[nth if nth < len(batches) else 0]
            scores = _scores(model, [window for window, _ in batch])
            if nth < len(batches):
                nats[0] += scores.sum()
                if not chunked_loss.chunked(model):
                    nats.index_add_(0, torch.tensor([1 + document for _, document in batch]), scores)
    model.train(was_training)
    total = _sum(nats.to(model.device) if model.device.type == "cuda" else nats).cpu()
    tokens = torch.tensor([len(ids) for ids in encoded])
    return Bits(float(total[0]), sum(len(t.encode()) for t in texts), int(tokens.sum()), (total[1:], tokens))


def _scores(model: PreTrainedModel, batch: list[Window]) -> torch.Tensor:
    """Sum of -ln p over the scored tokens of each window, in float64; of all of them [1] where the model takes its loss in chunks.

    Padding stands at the end, where it is seen by nothing.
    """
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        labels[row, window.context : len(window.ids)] = torch.tensor(window.ids[window.context :])
    ids, labels = ids.to(model.device), labels.to(model.device)
    positions = torch.arange(longest, device=ids.device).expand_as(ids)
    if chunked_loss.chunked(model):
        total: torch.Tensor = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False, num_items_in_batch=1).loss
        return total.double().cpu()[None]
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    # a row at a time: float32 logits of a whole batch at a large vocabulary would not fit
    rows = [F.cross_entropy(logits[row, :-1].float(), labels[row, 1:], reduction="sum").double().cpu() for row in range(len(batch))]
    return torch.stack(rows)


def _position() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _sum(value: torch.Tensor) -> torch.Tensor:
    if _position()[1] > 1:
        torch.distributed.all_reduce(value)
    return value
