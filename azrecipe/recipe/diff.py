"""Compare a recipe with its parent, or with an earlier state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from azrecipe.errors import RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.compose import compose_recipe, display_path, load_ancestry
from azrecipe.recipe.load import Recipe, resolve_paths
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.schema import load_schema
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key, YamlNode, parse_yaml
from azrecipe.utils.paths import LOCAL_PATH_CHECKS

_FILE_KEYS = ("extends", "fragment", "variables", "description")  # they describe a file, not a run


def diff_with_parent(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's differences from its parent, for parent.json.

    {"file", "extends": its ancestors, nearest first, "parent", "differences": [{"key", "value", "parent", "place"}]}. A
    difference has no "value" where the recipe removes a key, and no "parent" where the parent has no such key. Defaults are
    not filled in. `parent` is None where the files can no longer be read.
    """
    try:
        files = [path for path, _ in load_ancestry(recipe.path)]
        parent = files[1] if len(files) > 1 else files[0]
        parent_tree = resolve_paths(compose_recipe(parent).root, load_schema(recipe.stage))
    except RecipeError:
        return {"file": display_path(recipe.path), "extends": [], "parent": None, "differences": []}
    return {
        "file": display_path(recipe.path),
        "extends": [display_path(path) for path in files[1:]],
        "parent": display_path(parent),
        "differences": list(_iter_differences(parent_tree, recipe.tree)),
    }


def _iter_differences(old: YamlNode, new: YamlNode, keys: tuple[Key, ...] = ()) -> Iterator[dict[str, Any]]:
    a, b = old.value, new.value
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*b, *a]):
            if not keys and key in _FILE_KEYS:
                continue
            child_keys = (*keys, key)
            if key not in a:
                yield from _iter_added_keys(b[key], child_keys)
            elif key not in b:
                yield {"key": format_key_path(child_keys), "parent": a[key].to_plain(), "place": None}
            else:
                yield from _iter_differences(a[key], b[key], child_keys)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(item.value, dict) for item in b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _iter_differences(x, y, (*keys, i))
    elif old.to_plain() != new.to_plain():
        yield {"key": format_key_path(keys), "value": new.to_plain(), "parent": old.to_plain(), "place": str(new.location)}


def _iter_added_keys(node: YamlNode, keys: tuple[Key, ...]) -> Iterator[dict[str, Any]]:
    """Yield the keys that the parent lacks."""
    if isinstance(node.value, dict) and node.value:
        for key, child in node.value.items():
            yield from _iter_added_keys(child, (*keys, key))
    else:
        yield {"key": format_key_path(keys), "value": node.to_plain(), "place": str(node.location)}


def get_stage_value(root: YamlNode) -> Any:
    """Return the value of `stage`, which may be wrong or missing."""
    node = root.get("stage")
    return node.value if node else None


def iter_changed_keys(old: YamlNode | None, new: YamlNode | None, definition: schema.Schema, keys: tuple[Key, ...] = ()) -> Iterator[str]:
    """Yield the keys that differ and can change the weights.

    The location of a local file is not compared, as the hash of its content is an input of the run.

    Args:
        old: The tree of one recipe, or a part of it.
        new: The same part of the other recipe.
        definition: The schema of this part.
        keys: The path of keys to this part.
    """
    definition = schema.resolve_ref(definition)
    if definition.get("x-changes-weights") is False:
        return
    a, b = (node.value if node else None for node in (old, new))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b}:
            child = schema.subschema(definition, key) or {}
            yield from iter_changed_keys(a.get(key) or _parse_default(child), b.get(key) or _parse_default(child), child, (*keys, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from iter_changed_keys(x, y, schema.subschema(definition, i) or {}, (*keys, i))
    elif a != b and not _is_same_file(a, b, definition.get("x-path")):
        yield format_key_path(keys)


def _parse_default(definition: schema.Schema) -> YamlNode | None:
    """Return the default of a key that a recipe lacks.

    With it a run of an azrecipe that did not have the key can be resumed.
    """
    value = schema.resolve_ref(definition).get("default")
    return None if value is None else parse_yaml(to_yaml({"value": value}), "").get("value")


def _is_same_file(a: Any, b: Any, kind: str | None) -> bool:
    """Whether two values are paths of one local file from two folders."""
    if kind is None or not isinstance(a, str) or not isinstance(b, str):
        return False
    is_local = LOCAL_PATH_CHECKS[kind]
    return is_local(a) and is_local(b) and Path(a).name == Path(b).name
