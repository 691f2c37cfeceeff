"""How likely a model finds reference answers: losses and preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from azrecipe.data.finetuning_examples import PreferenceExample
from azrecipe.data.packing import get_padded_length
from azrecipe.evaluation.token_losses import compute_token_losses
from azrecipe.tokenization.chat_templates import TokenizedExample
from azrecipe.tokenization.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MAX_BATCH_TOKENS = 4_096  # tokens in a forward pass


class Likelihood(NamedTuple):
    """The ln p of an example's trained tokens, and their number."""

    log_p: float
    num_tokens: int


class PaddedBatch(NamedTuple):
    """Token ids and labels of some sequences, both int64 [sequences, length]."""

    ids: torch.Tensor
    labels: torch.Tensor


def pad_batch(model: PreTrainedModel, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> PaddedBatch:
    """Pad sequences at the end, where no token attends to the padding.

    Args:
        model: The model that the batch is for.
        ids: Token ids of each sequence.
        labels: Their labels, IGNORE_INDEX where a token is not scored.
    """
    length = get_padded_length(model, max(map(len, ids)))
    batch = PaddedBatch(torch.zeros(len(ids), length, dtype=torch.long), torch.full((len(ids), length), IGNORE_INDEX))
    for row, (sequence, sequence_labels) in enumerate(zip(ids, labels, strict=True)):
        batch.ids[row, : len(sequence)] = torch.tensor(sequence)
        batch.labels[row, : len(sequence_labels)] = torch.tensor(sequence_labels)
    return batch


def compute_log_likelihoods(model: PreTrainedModel, examples: Sequence[TokenizedExample], batch_size: int) -> list[Likelihood]:
    """Compute ln p of the trained tokens of each example.

    Args:
        model: The model; its mode is kept.
        examples: Token ids and labels of each example.
        batch_size: Examples in a forward pass at most.

    Returns:
        For each example its ln p and its number of trained tokens.
    """
    likelihoods: list[Likelihood] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        start = 0
        while start < len(examples):
            longest = max(len(e.input_ids) for e in examples[start : start + batch_size])
            batch = examples[start : start + max(1, min(batch_size, MAX_BATCH_TOKENS // longest))]
            start += len(batch)
            ids, labels = pad_batch(model, [e.input_ids for e in batch], [e.labels for e in batch])
            log_p = -compute_token_losses(model, ids, labels).sum(1).cpu()
            counts = (labels[:, 1:] != IGNORE_INDEX).sum(1)
            likelihoods += [Likelihood(*pair) for pair in zip(log_p.tolist(), counts.tolist(), strict=True)]
    model.train(was_training)
    return likelihoods


def compute_mean_loss(model: PreTrainedModel, examples: Sequence[TokenizedExample], batch_size: int) -> float | None:
    """Compute the mean -ln p of a trained token, in nats.

    It is comparable between models of one vocabulary only. None where there are no examples.
    """
    if not examples:
        return None
    likelihoods = compute_log_likelihoods(model, examples, batch_size)
    return -sum(example.log_p for example in likelihoods) / sum(example.num_tokens for example in likelihoods)


def compute_preferences(model: PreTrainedModel, pairs: Sequence[PreferenceExample], batch_size: int) -> list[float]:
    """Compute ln p(chosen) - ln p(rejected) of each pair."""
    chosen, rejected = (compute_log_likelihoods(model, [pair.to_example(side) for pair in pairs], batch_size) for side in (True, False))
    return [a.log_p - b.log_p for a, b in zip(chosen, rejected, strict=True)]
