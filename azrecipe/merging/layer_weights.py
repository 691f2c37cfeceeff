"""Each model's weight for each parameter, by groups of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError
from azrecipe.modeling.parameter_groups import explain_no_match, match_parameters
from azrecipe.recipe.types import MergeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_weights(model: PreTrainedModel, name: str, source: MergeModel) -> dict[str, float]:
    """Return a model's weight for each parameter.

    Of several groups that name a parameter, the first one counts. Where a recipe has weights by group, a parameter that no group
    names has weight 0.

    Args:
        model: The merged model on the meta device.
        name: The model's name in the recipe.
        source: The recipe's entry.

    Raises:
        CommandError: A group names no parameter; the message has every such group.
    """
    parameters = dict(model.named_parameters())
    if source.weights is None:
        return dict.fromkeys(parameters, 1.0 if source.weight is None else source.weight)
    resolved: dict[str, float] = {}
    problems = []
    for pattern, weight in source.weights.items():
        try:
            matched = match_parameters(model, pattern, parameters)
        except CommandError as error:
            problems.append(f"models.{name}.weights: {error}")
            continue
        if not matched:
            problems.append(f"models.{name}.weights: {explain_no_match(pattern, parameters)}")
        for parameter in matched:
            resolved.setdefault(parameter, weight)
    if problems:
        raise CommandError("\n".join(problems))
    return {parameter: resolved.get(parameter, 0.0) for parameter in parameters}


def check_weight_sums(weights: Mapping[str, Mapping[str, float]]) -> None:
    """Check that the weights of each parameter add up to more than 0.

    Args:
        weights: For each model, the weight of each parameter.

    Raises:
        CommandError: They do not: there is no weighted mean.
    """
    names = next(iter(weights.values()))
    empty = [name for name in names if sum(model[name] for model in weights.values()) <= 0]
    if empty:
        rest = f" and {len(empty) - 1:,} other parameters" if len(empty) > 1 else ""
        raise CommandError(
            f"the models' weights of {empty[0]}{rest} add up to 0, and a mean needs more. Give a last group, as all: 1.0, to the model that is kept"
        )
