"""How two recipes differ: a recipe and its parent, and two states of one recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from azrecipe.errors import RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.compose import chain, compose, shown
from azrecipe.recipe.load import Recipe, resolve_paths
from azrecipe.recipe.overrides import dotted
from azrecipe.recipe.schema import document
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key, Node, parse
from azrecipe.utils.paths import LOCAL

_OWN = ("extends", "fragment", "variables", "description")  # say what a file is, not what a run does


def differences(recipe: Recipe) -> dict[str, Any]:
    """{"file", "extends": its ancestors, nearest first, "parent", "differences": [{"key", "value", "parent", "place"}]}.

    A difference lacks "value" where the recipe has taken a key away and "parent" where the parent has none. Defaults are not filled
    in on either side. `parent` is None where the files can no longer be read.
    """
    try:
        files = [path for path, _ in chain(recipe.path)]
        parent = files[1] if len(files) > 1 else files[0]
        before = resolve_paths(compose(parent).root, document(recipe.stage))
    except RecipeError:
        return {"file": shown(recipe.path), "extends": [], "parent": None, "differences": []}
    return {
        "file": shown(recipe.path),
        "extends": [shown(path) for path in files[1:]],
        "parent": shown(parent),
        "differences": list(_between(before, recipe.tree)),
    }


def _between(old: Node, new: Node, at: tuple[Key, ...] = ()) -> Iterator[dict[str, Any]]:
    a, b = old.value, new.value
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*b, *a]):
            if not at and key in _OWN:
                continue
            here = (*at, key)
            if key not in a:
                yield from _added(b[key], here)
            elif key not in b:
                yield {"key": dotted(here), "parent": a[key].plain(), "place": None}
            else:
                yield from _between(a[key], b[key], here)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(item.value, dict) for item in b):
        for nth, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _between(x, y, (*at, nth))
    elif old.plain() != new.plain():
        yield {"key": dotted(at), "value": new.plain(), "parent": old.plain(), "place": str(new.place)}


def _added(node: Node, at: tuple[Key, ...]) -> Iterator[dict[str, Any]]:
    """What the parent has nothing of, key by key."""
    if isinstance(node.value, dict) and node.value:
        for key, below in node.value.items():
            yield from _added(below, (*at, key))
    else:
        yield {"key": dotted(at), "value": node.plain(), "place": str(node.place)}


def stage_word(root: Node) -> Any:
    node = root.get("stage")
    return node.value if node else None


def changed_keys(old: Node | None, new: Node | None, definition: schema.Schema, at: tuple[Key, ...] = ()) -> Iterator[str]:
    """Keys whose values differ and can change the weights. Where a file stands does not matter, its content is an input."""
    definition = schema.follow(definition)
    if definition.get("x-changes-weights") is False:
        return
    a, b = (node.value if node else None for node in (old, new))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b}:
            below = schema.below(definition, key) or {}
            yield from changed_keys(a.get(key) or _default(below), b.get(key) or _default(below), below, (*at, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from changed_keys(x, y, schema.below(definition, i) or {}, (*at, i))
    elif a != b and not _moved(a, b, definition.get("x-path")):
        yield dotted(at)


def _default(definition: schema.Schema) -> Node | None:
    """What a key that a recipe lacks stands for: a run made before the key was there goes on."""
    value = schema.follow(definition).get("default")
    return None if value is None else parse(to_yaml({"value": value}), "").get("value")


def _moved(a: Any, b: Any, kind: str | None) -> bool:
    """Whether two values are the same local file or folder seen from two places."""
    if kind is None or not isinstance(a, str) or not isinstance(b, str):
        return False
    local = LOCAL[kind]
    return local(a) and local(b) and Path(a).name == Path(b).name
