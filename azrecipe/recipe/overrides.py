"""Parse `--set key.path=value`, and paths of keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from azrecipe.errors import Problem, RecipeError, SourceLocation
from azrecipe.recipe.yaml_tree import Key, YamlNode, parse_yaml

_STEP = re.compile(r"([^=:]+\.ya?ml):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """A value that replaces one of the recipe."""

    keys: tuple[Key, ...]
    node: YamlNode
    step: str | None = None  # a pipeline's step; None: the recipe itself

    @property
    def key_path(self) -> str:
        """The keys as a user writes them: data.datasets[0].weight."""
        return format_key_path(self.keys)


def format_key_path(keys: Sequence[Key]) -> str:
    """Format keys as a user writes them: data.datasets[0].weight."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def parse_key_path(path: str) -> tuple[Key, ...] | None:
    """Parse `data.datasets[0].weight` (or `.0.`) as keys.

    Returns None where a part is empty.
    """
    keys: list[Key] = []
    for part in path.split("."):
        match = re.fullmatch(r"([^\[\]]+)((?:\[\d+\])*)", part)
        if not match:
            return None
        name = match[1]
        keys.append(int(name) if name.isascii() and name.isdigit() and keys else name)
        keys.extend(int(index) for index in re.findall(r"\[(\d+)\]", match[2]))
    return tuple(keys)


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Parse the arguments of `--set`.

    Each is `key.path=value` or, for a pipeline, `step.yaml:key.path=value`. Raises RecipeError with every wrong one.
    """
    overrides: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        location = SourceLocation(f"--set {text}")
        step, rest = (match[1], match[2]) if (match := _STEP.match(text)) else (None, text)
        path, equals, value = rest.partition("=")
        keys = parse_key_path(path.strip())
        if not equals or keys is None:
            problems.append(Problem(location, "write key.path=value, for example data.max_length=4096"))
            continue
        try:
            node = parse_yaml(value, location.file, location=location)
        except RecipeError as error:
            problems.extend(error.problems)
            continue
        overrides.append(Override(keys, YamlNode(node.value, location, location), step))
    if problems:
        raise RecipeError(problems)
    return overrides
