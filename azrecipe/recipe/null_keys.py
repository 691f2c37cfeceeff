"""Keys whose value is null: what they remove, and those that are wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from azrecipe.errors import Problem, suggest_choices
from azrecipe.recipe import schema
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.yaml_tree import Key, YamlNode

_LEVELS_ABOVE_CHANGES = {"set": 0, "matrix": 2}  # keys that change steps: the number of levels (cell, step) above the changes
_ALL_LEVELS = 99


@dataclass(frozen=True)
class NullKey:
    """A key of a merged tree whose value is null.

    `removes_value` says whether an inherited value goes with it.
    """

    keys: tuple[Key, ...]
    node: YamlNode
    removes_value: bool


def find_null_keys(root: YamlNode, inherited: Iterable[tuple[tuple[Key, ...], YamlNode]]) -> tuple[NullKey, ...]:
    """Return the keys whose value is null.

    Nulls below a pipeline's `set` and `matrix` are changes to its steps, and are left out.

    Args:
        root: The merged tree, nulls included.
        inherited: The trees that were merged and the overrides, each with the path of keys at which it was put.
    """
    defined: set[tuple[Key, ...]] = set()
    for keys, node in inherited:
        if node.value is not None:
            defined.update(keys[:end] for end in range(1, len(keys)))
            defined.update(_list_paths(node, keys))
    return tuple(NullKey(keys, node, keys in defined) for keys, node in _iter_nulls(root))


def _list_paths(node: YamlNode, keys: tuple[Key, ...]) -> Iterator[tuple[Key, ...]]:
    if node.value is not None:
        yield keys
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for key, child in children:
        yield from _list_paths(child, (*keys, key))


def _iter_nulls(node: YamlNode, keys: tuple[Key, ...] = (), levels: int = _ALL_LEVELS) -> Iterator[tuple[tuple[Key, ...], YamlNode]]:
    if levels == 0:
        return
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            if child.value is None:
                yield (*keys, key), child
            else:
                yield from _iter_nulls(child, (*keys, key), _count_levels(key, levels))
    elif isinstance(node.value, list):
        for i, item in enumerate(node.value):
            yield from _iter_nulls(item, (*keys, i), levels)


def _count_levels(key: str, levels: int) -> int:
    """Return the number of levels below a key whose nulls remove keys."""
    return _LEVELS_ABOVE_CHANGES.get(key, levels - 1)


def drop_nulls(node: YamlNode, levels: int = _ALL_LEVELS) -> YamlNode:
    """Return the tree without keys whose value is null.

    Only the given number of levels is changed. The nulls have removed their keys when the files were merged.
    """
    if levels == 0:
        return node
    if isinstance(node.value, dict):
        entries = {key: child for key, child in node.value.items() if child.value is not None}
        return replace(node, value={key: drop_nulls(child, _count_levels(key, levels)) for key, child in entries.items()})
    if isinstance(node.value, list):
        return replace(node, value=[drop_nulls(item, levels) for item in node.value])
    return node


def check_null_keys(null_keys: Iterable[NullKey], definition: schema.Schema) -> Iterator[Problem]:
    """Find null keys that the schema does not know.

    A key of the schema may be null. A name of the user's choice may be null only where it removes an inherited value.
    """
    for null_key in null_keys:
        parent: schema.Schema | None = definition
        for key in null_key.keys[:-1]:
            parent = schema.subschema(parent, key) if parent is not None else None
        if parent is None:
            continue  # the schema reports the unknown key above it
        name, properties = str(null_key.keys[-1]), schema.resolve_ref(parent).get("properties", {})
        if name in properties or null_key.removes_value:
            continue
        location = null_key.node.entry_location
        if schema.resolve_ref(parent).get("additionalProperties") is False:
            key, colon, value = name.partition(":")
            if colon and key in properties:
                yield Problem(location, f"no space behind the colon: write {key}: {value}")
                continue
            yield Problem(location, f"unknown key '{name}'{suggest_choices(name, properties, 'Allowed here')}")
        else:
            path = format_key_path(null_key.keys)
            yield Problem(location, f"{path} has no value, and there is no inherited one to remove: give it a value, or remove the line")
