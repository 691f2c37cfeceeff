"""Optimizer settings of phases, and the optimizers of a recipe."""

from __future__ import annotations

from dataclasses import fields, replace

from azrecipe.recipe.types import Phase, PretrainConfig, SftConfig, Training

PHASE_OVERRIDABLE_KEYS = tuple({f.name for f in fields(Phase)} & {f.name for f in fields(Training)})  # a phase may override them


def merge_phase_settings(training: Training, phase: Phase) -> Training:
    """Return the recipe's `training` with the overrides of a phase."""
    return replace(training, **{key: value for key in PHASE_OVERRIDABLE_KEYS if (value := getattr(phase, key)) is not None})


def list_optimizers(config: PretrainConfig | SftConfig) -> list[str]:
    """Return the optimizers that a recipe trains with, each once."""
    phases = config.phases if isinstance(config, PretrainConfig) else []
    return list(dict.fromkeys([merge_phase_settings(config.training, phase).optim for phase in phases] or [config.training.optim]))
