"""The optimizer settings of a phase, and the optimizers that a recipe names."""

from __future__ import annotations

from dataclasses import fields, replace

from azrecipe.recipe.types import Phase, Pretrain, Sft, Training

OWN = tuple({f.name for f in fields(Phase)} & {f.name for f in fields(Training)})  # keys that a phase may have to itself


def of_phase(training: Training, phase: Phase) -> Training:
    """The settings that a phase trains with: the recipe's `training`, and in it what the phase says itself."""
    return replace(training, **{key: value for key in OWN if (value := getattr(phase, key)) is not None})


def named(config: Pretrain | Sft) -> list[str]:
    """The optimizers that a recipe trains with, each once."""
    phases = config.phases if isinstance(config, Pretrain) else []
    return list(dict.fromkeys([of_phase(config.training, phase).optim for phase in phases] or [config.training.optim]))
