"""Knows a phase's optimizer and schedule in transformers' words, and which optimizers need another package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from azrecipe.errors import CannotRun
from azrecipe.parts.batches import split
from azrecipe.recipe.types import Phase, Pretrain, Sft, Training

BITSANDBYTES = ("adamw_8bit", "lion_32bit", "lion_8bit")
OWN = tuple({f.name for f in fields(Phase)} & {f.name for f in fields(Training)})  # keys that a phase may have to itself


def of_phase(training: Training, phase: Phase) -> Training:
    """The settings that a phase trains with: the recipe's `training`, and in it what the phase says itself."""
    return replace(training, **{key: value for key in OWN if (value := getattr(phase, key)) is not None})


def named(config: Pretrain | Sft) -> list[str]:
    """The optimizers that a recipe trains with, each once."""
    phases = config.phases if isinstance(config, Pretrain) else []
    return list(dict.fromkeys([of_phase(config.training, phase).optim for phase in phases] or [config.training.optim]))


def check(names: Iterable[str]) -> None:
    """Raise CannotRun for optimizers whose package is missing."""
    lacking = [name for name in names if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None]
    if lacking:
        raise CannotRun(
            f"optim: {', '.join(lacking)} needs bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or --set training.optim=adamw_torch_fused"
        )


def check_sharded(config: Pretrain | Sft, fsdp: bool, readers: int) -> None:
    """Raise CannotRun for what fails in the first step of a model that FSDP 2 has split; `readers`: processes that read different sequences.

    transformers' Adafactor mixes whole and split tensors (5.23, optimization.py). TRL takes the head's weight past FSDP (1.16,
    add_fused_lm_head), which fails where an adapter's gradients accumulate under mixed precision.
    """
    if not fsdp:
        return
    if "adafactor" in named(config):
        raise CannotRun("optim: adafactor does not work on a model that FSDP splits: --set training.optim=adamw_torch_fused, or ddp")
    training = config.training
    if isinstance(config, Sft) and config.adapter != "none" and training.precision == "bf16_mixed":
        batch = split(training.global_batch_size, training.per_device_train_batch_size, readers)
        if batch.accumulation > 1:
            raise CannotRun(
                f"an adapter under precision: bf16_mixed cannot accumulate {batch.accumulation} batches where FSDP splits the model: as many processes "
                f"as make it one batch ({training.global_batch_size // training.per_device_train_batch_size}), ddp, or bf16_pure"
            )


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
