"""A phase's optimizer and schedule as transformers' arguments."""

from __future__ import annotations

from typing import Any

from azrecipe.recipe.types import Training


def build_optimizer_arguments(training: Training, max_steps: int) -> dict[str, Any]:
    """Build TrainingArguments' fields for the optimizer and learning rate schedule.

    warmup_stable_decay falls by 1 - sqrt(share of the decay), which Hägele et al. (2024, arXiv 2405.18392) found best.
    """
    warmup = round(training.warmup_ratio * max_steps)
    name, scheduler_arguments = training.lr_scheduler_type, {}
    if name == "warmup_stable_decay":
        decay = min(max(1, round(training.decay_ratio * max_steps)), max_steps - warmup)
        scheduler_arguments = {"num_decay_steps": decay, "decay_type": "1-sqrt", "min_lr_ratio": training.min_lr_ratio}
    elif name == "cosine" and training.min_lr_ratio > 0:
        name, scheduler_arguments = "cosine_with_min_lr", {"min_lr_rate": training.min_lr_ratio}
    return {"optim": training.optim, "lr_scheduler_type": name, "lr_scheduler_kwargs": scheduler_arguments or None, "warmup_steps": warmup}
