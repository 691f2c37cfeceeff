"""Rules of `stage: merge`: names of models, and keys without effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from azrecipe.errors import Problem, suggest_choices
from azrecipe.recipe import parameter_groups
from azrecipe.recipe.rules.evaluate import check_distinct_models
from azrecipe.recipe.yaml_tree import YamlNode

BASE_METHODS = ("task_arithmetic", "ties", "dare_ties")
DENSITY_METHODS = ("ties", "dare_ties")
MEAN_METHODS = ("linear", "slerp")
RESERVED_NAME = "base"  # of a model: the recipe's key `base` has it


def check_merge(root: YamlNode) -> Iterator[Problem]:
    """Yield the problems of a tree, which may have failed its schema."""
    yield from check_distinct_models(root)
    method_node, models = root.get("method"), root.get("models")
    method = method_node.value if method_node is not None else None
    entries = models.value if models is not None and isinstance(models.value, dict) else {}
    if method_node is not None and models is not None and method in (*BASE_METHODS, *MEAN_METHODS):
        yield from _check_base(root, method_node)
        yield from _check_counts(method_node, models, len(entries))
        density = root.get("density")
        if density is not None and density.value is not None and method not in DENSITY_METHODS:
            yield Problem(density.entry_location, f"density is for {' and '.join(DENSITY_METHODS)}, and the method is {method}")
        if method in MEAN_METHODS:
            yield from _check_mean(method, models, entries)
    if RESERVED_NAME in entries:
        yield Problem(entries[RESERVED_NAME].entry_location, f"a model cannot be called {RESERVED_NAME}: that is the key of the base model")
    for key in ("tokenizer_of", "special_tokens_from"):
        node = root.get(key)
        if node is not None and isinstance(node.value, str) and entries and node.value not in entries:
            yield Problem(node.location, f"{key} names no model: '{node.value}'{suggest_choices(node.value, entries, 'Models')}")
    for entry in entries.values():
        yield from _check_weights(entry)


def _check_base(root: YamlNode, method: YamlNode) -> Iterator[Problem]:
    base = root.get("base")
    has_base = base is not None and base.value is not None
    if method.value in BASE_METHODS and not has_base:
        yield Problem(method.location, f"method: {method.value} needs a base: add base: {{name_or_path: …}} or base: {{output_of: …}}")
    if method.value in MEAN_METHODS and base is not None and has_base:
        yield Problem(base.entry_location, f"base is for {', '.join(BASE_METHODS)}, and the method is {method.value}: remove it")


def _check_counts(method: YamlNode, models: YamlNode, count: int) -> Iterator[Problem]:
    if method.value == "slerp" and count != 2:
        yield Problem(models.entry_location, f"method: slerp merges two models: there {'is' if count == 1 else 'are'} {count}")
    elif method.value == "linear" and count == 1:
        yield Problem(models.entry_location, "method: linear needs at least two models: there is 1")


def _check_mean(method: str, models: YamlNode, entries: Mapping[str, YamlNode]) -> Iterator[Problem]:
    """Check the weights of a mean: none negative, not all 0."""
    weights: list[float] = []
    for name, entry in entries.items():
        numbers = [(node, value) for node in _list_weights(entry) if (value := node.number) is not None]
        weights += [value for _, value in numbers] or [1.0]
        for node, value in numbers:
            if value < 0:
                yield Problem(node.location, f"the weight of {name} is below 0, and method: {method} takes a mean")
    if weights and all(weight == 0 for weight in weights):
        yield Problem(models.entry_location, f"all weights are 0, and method: {method} takes a mean")


def _list_weights(entry: YamlNode) -> list[YamlNode]:
    """List a model's weight, or its weights by group."""
    if not isinstance(entry.value, dict):
        return []
    groups, weight = entry.get("weights"), entry.get("weight")
    nodes = list(groups.value.values()) if groups is not None and isinstance(groups.value, dict) else []
    return [*nodes, *([weight] if weight is not None and weight.value is not None else [])]


def _check_weights(entry: YamlNode) -> Iterator[Problem]:
    """Check the weights of one model."""
    if not isinstance(entry.value, dict):
        return
    groups, weight = entry.get("weights"), entry.get("weight")
    if groups is not None and isinstance(groups.value, dict):
        if weight is not None and weight.value is not None:
            yield Problem(weight.entry_location, "give weight or weights: a last group, as all: 1.0, is for all other parameters")
        for pattern, node in groups.value.items():
            if problem := parameter_groups.find_pattern_problem(pattern):
                yield Problem(node.entry_location, problem)
            elif pattern in parameter_groups.NEW_TOKEN_GROUPS:
                yield Problem(
                    node.entry_location, f"{pattern} is a part of a matrix: write {'embeddings' if pattern == 'new_tokens' else 'head'}"
                )
