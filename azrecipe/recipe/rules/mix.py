"""Rules of the mix: the sources' ids and the phases' weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from azrecipe.errors import Problem, suggest_choices
from azrecipe.recipe.yaml_tree import YamlNode


def check_mix(root: YamlNode) -> Iterator[Problem]:
    """Check the sources' ids, weights and sampling temperature against each other."""
    sources, phases = _list_items(root.get("data", "datasets")), _list_items(root.get("phases"))
    temperature = root.get("data", "sampling_temperature")
    if temperature is not None:
        yield from _check_temperature(sources, phases)
    ids: dict[str, YamlNode] = {}
    for source in sources:
        node = source.get("id")
        if node is None or not isinstance(node.value, str):
            continue
        if node.value in ids:
            yield Problem(node.location, f"two sources have the id '{node.value}'; the other is at {ids[node.value].location}")
        ids.setdefault(node.value, node)
    by_phase = [_read_weights(phase) for phase in phases]
    yield from (problem for weights in by_phase for problem in _check_weights(sources, ids, weights))
    if any(by_phase):  # where no phase has weights, ids may come from a file that is extended
        for name, node in ids.items():
            if not any(name in weights for weights in by_phase):
                yield Problem(node.location, f"the weights of no phase name the id '{name}': name it there, or remove the id")


def _list_items(node: YamlNode | None) -> Sequence[YamlNode]:
    return [item for item in node.value if isinstance(item.value, dict)] if node is not None and isinstance(node.value, list) else []


def _read_weights(phase: YamlNode) -> Mapping[str, YamlNode]:
    """Read a phase's weights by id, without those that are no numbers."""
    node = phase.get("data", "weights")
    entries = node.value.items() if node is not None and isinstance(node.value, dict) else ()
    return {str(name): weight for name, weight in entries if weight.number is not None}


def _check_temperature(sources: Sequence[YamlNode], phases: Sequence[YamlNode]) -> Iterator[Problem]:
    """Check that weights and a sampling temperature are not both set."""
    for node in [source.get("weight") for source in sources] + [phase.get("data", "weights") for phase in phases]:
        if node is not None:
            name = "weights" if isinstance(node.value, dict) else "weight"
            message = f"{name} and data.sampling_temperature both determine how much of a source is read: remove one of them"
            yield Problem(node.entry_location, message)


def _check_weights(sources: Sequence[YamlNode], ids: Mapping[str, YamlNode], weights: Mapping[str, YamlNode]) -> Iterator[Problem]:
    """Check that the weights of a phase name sources, and leave some text."""
    for name, node in weights.items():
        if name not in ids:
            known = suggest_choices(name, ids, "Ids of data.datasets") if ids else ". No source of data.datasets has an id"
            yield Problem(node.entry_location, f"no source has the id '{name}'{known}")
    if weights and sources and all(_has_no_weight(source, weights) for source in sources):
        first = next(iter(weights.values()))
        yield Problem(first.entry_location, "the weights of all sources are 0: this phase has nothing to read")


def _has_no_weight(source: YamlNode, weights: Mapping[str, YamlNode]) -> bool:
    """Whether the weights of a phase leave a source out."""
    name = source.get("id")
    weight = weights.get(str(name.value)) if name is not None else None
    return weight is not None and weight.value == 0
