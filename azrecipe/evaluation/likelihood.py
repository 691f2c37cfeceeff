"""How likely a model finds answers: losses and preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from azrecipe.data.finetuning_examples import PairExample
from azrecipe.tokenization.chat_templates import Example
from azrecipe.tokenization.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOGETHER = 4_096  # tokens whose logits are there at once


def log_likelihoods(model: PreTrainedModel, given: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
    """ln p of the trained tokens of each example, and how many they are."""
    found: list[tuple[float, int]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        at = 0
        while at < len(given):
            longest = max(len(e.input_ids) for e in given[at : at + batch_size])
            batch = given[at : at + max(1, min(batch_size, TOGETHER // longest))]
            at += len(batch)
            width = max(len(e.input_ids) for e in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full((len(batch), width), IGNORED)
            for row, example in enumerate(batch):
                ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
                labels[row, : len(example.labels)] = torch.tensor(example.labels)
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            for row, label in enumerate(labels[:, 1:].to(model.device)):
                on = label != IGNORED  # what is not trained takes no memory in float32
                found.append((-float(F.cross_entropy(logits[row, :-1][on].float(), label[on], reduction="sum")), int(on.sum())))
    model.train(was_training)
    return found


def loss(model: PreTrainedModel, given: Sequence[Example], batch_size: int) -> float | None:
    """Mean -ln p a trained token over examples, in the model's own vocabulary; None where there are none."""
    if not given:
        return None
    found = log_likelihoods(model, given, batch_size)
    return -sum(value for value, _ in found) / sum(count for _, count in found)


def preferences(model: PreTrainedModel, given: Sequence[PairExample], batch_size: int) -> list[float]:
    """ln p(chosen) - ln p(rejected) of each pair, given its prompt."""
    sides = [[value for value, _ in log_likelihoods(model, [pair.side(chosen) for pair in given], batch_size)] for chosen in (True, False)]
    return [a - b for a, b in zip(*sides, strict=True)]
