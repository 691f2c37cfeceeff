"""A phase's optimizer and schedule in transformers' words."""

from __future__ import annotations

from typing import Any

from azrecipe.recipe.types import Training


def arguments(training: Training, max_steps: int) -> dict[str, Any]:
    """transformers.TrainingArguments' fields for the optimizer's name and the learning rate of a loop of `max_steps` steps.

    warmup_stable_decay falls by 1 - sqrt(share of the decay), which Hägele et al. (2024, arXiv 2405.18392) found best.
    """
    warmup = round(training.warmup_ratio * max_steps)
    name, further = training.lr_scheduler_type, {}
    if name == "warmup_stable_decay":
        decay = min(max(1, round(training.decay_ratio * max_steps)), max_steps - warmup)
        further = {"num_decay_steps": decay, "decay_type": "1-sqrt", "min_lr_ratio": training.min_lr_ratio}
    elif name == "cosine" and training.min_lr_ratio > 0:
        name, further = "cosine_with_min_lr", {"min_lr_rate": training.min_lr_ratio}
    return {"optim": training.optim, "lr_scheduler_type": name, "lr_scheduler_kwargs": further or None, "warmup_steps": warmup}
