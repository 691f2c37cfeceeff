"""`--set key.path=value`, and a pipeline's `set:`: one changed value, and where that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from azrecipe.errors import Place, Problem, RecipeError
from azrecipe.recipe.yaml_tree import Key, Node, parse

_STEP = re.compile(r"([^=:]+\.ya?ml):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One value put in place of another. `step` names a pipeline's step, or is None for the recipe itself."""

    keys: tuple[Key, ...]
    node: Node
    step: str | None = None

    @property
    def dotted(self) -> str:
        """The path as a user writes it: data.datasets[0].weight."""
        return dotted(self.keys)


def dotted(keys: Sequence[Key]) -> str:
    """A path as a user writes it: data.datasets[0].weight."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def split_keys(path: str) -> tuple[Key, ...] | None:
    """`data.datasets[0].weight` (or `.0.`) as keys; None when a part is empty."""
    keys: list[Key] = []
    for part in path.split("."):
        match = re.fullmatch(r"([^\[\]]+)((?:\[\d+\])*)", part)
        if not match:
            return None
        name = match[1]
        keys.append(int(name) if name.isdigit() and keys else name)
        keys.extend(int(index) for index in re.findall(r"\[(\d+)\]", match[2]))
    return tuple(keys)


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Read `--set` arguments, `key.path=value` or, for a pipeline, `step.yaml:key.path=value`.

    Raises RecipeError with every one that cannot be read.
    """
    overrides: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        place = Place(f"--set {text}")
        step, rest = (match[1], match[2]) if (match := _STEP.match(text)) else (None, text)
        path, equals, value = rest.partition("=")
        keys = split_keys(path.strip())
        if not equals or keys is None:
            problems.append(Problem(place, "write key.path=value, for example data.max_length=4096"))
            continue
        try:
            node = parse(value, place.file, at=place)
        except RecipeError as error:
            problems.extend(error.problems)
            continue
        overrides.append(Override(keys, Node(node.value, place, place), step))
    if problems:
        raise RecipeError(problems)
    return overrides
