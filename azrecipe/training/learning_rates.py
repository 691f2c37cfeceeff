"""Learning rates by part of the model, as parameter groups of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from azrecipe.errors import CommandError
from azrecipe.modeling import parameter_groups
from azrecipe.training import trainer as training_trainer


def resolve_learning_rates(model: torch.nn.Module, rates: Mapping[str, float], trainable_only: bool = True) -> dict[str, float]:
    """Resolve the learning rate of each parameter that a part names.

    The first part that matches a parameter counts.

    Args:
        model: The model, with its adapter.
        rates: The learning rate of each part (a group or a regular expression).
        trainable_only: Consider only parameters that train.

    Raises:
        CommandError: No parameter is left for a part.
    """
    rate_by_name: dict[str, float] = {}
    problems = []
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or not trainable_only}
    for part, rate in rates.items():
        try:
            matched = [name for name in parameter_groups.match_parameters(model, part, parameters) if name not in rate_by_name]
        except CommandError as error:
            problems.append(f"learning_rates: {error}")
            continue
        if not matched:
            examples = "\n  ".join(list(parameters)[:12])
            problems.append(f"learning_rates: {part} matches no parameter that trains. The first that do:\n  {examples}")
        rate_by_name |= dict.fromkeys(matched, rate)
    if problems:
        raise CommandError("\n".join(problems))
    return rate_by_name


class LearningRatesMixin(training_trainer.NonEmptyParamGroupsMixin):
    """A mixin for Trainer with learning rates by part."""

    learning_rates: Mapping[str, float] = {}

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Create the optimizer, its parameter groups split by learning rate."""
        optimizer = super().create_optimizer(*arguments, **options)
        if not self.learning_rates:
            return optimizer
        rates = resolve_learning_rates(self.model, self.learning_rates)
        by_id = {id(p): rates[name] for name, p in self.model.named_parameters() if name in rates}
        groups = []
        for group in optimizer.param_groups:
            for rate in dict.fromkeys(by_id.get(id(p), group["lr"]) for p in group["params"]):
                parameters = [p for p in group["params"] if by_id.get(id(p), group["lr"]) == rate]
                groups.append({**group, "params": parameters, "lr": rate})
        groups.sort(key=lambda group: group["lr"] != self.args.learning_rate)  # the first group's rate is logged
        optimizer.param_groups[:] = groups
        return optimizer
