"""Refuse recipes whose values look like passwords, tokens or private keys.

A run writes its recipe into recipe.yaml, reports, model cards and trackers, where others read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from azrecipe.errors import Problem, RecipeError, SourceLocation
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.yaml_tree import Key, YamlNode
from azrecipe.utils.secret_scan import PRAGMA, WAY_OUT, find_secrets


def find_secret_values(node: YamlNode, keys: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], YamlNode, str]]:
    """Yield keys, node and kind of each value that looks like a secret.

    A line of the file that ends with detect-secrets' comment is passed over.
    """
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            if find_secrets(key) and not _is_allowed(child.entry_location):
                yield keys, child, "in a key"
            yield from find_secret_values(child, (*keys, key))
    elif isinstance(node.value, list):
        for i, child in enumerate(node.value):
            yield from find_secret_values(child, (*keys, i))
    elif isinstance(node.value, str):
        name = next((key for key in reversed(keys) if isinstance(key, str)), "value")
        secrets = find_secrets(node.value) or find_secrets(f'{name}: "{node.value}"')
        if secrets and not _is_allowed(node.location):
            yield keys, node, secrets[0].kind


def _is_allowed(location: SourceLocation) -> bool:
    """Whether a value's line in its file has detect-secrets' comment."""
    if not location.line:
        return False
    try:
        lines = Path(location.file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return location.line <= len(lines) and PRAGMA in lines[location.line - 1]


def list_secret_problems(recipes: Iterable[Recipe]) -> list[Problem]:
    """List a problem for each value of recipes that looks like a secret."""
    message = "{} looks like a secret ({}), and recipes are copied into runs, reports and uploads: remove it; {}"
    return list(
        dict.fromkeys(
            Problem(node.location, message.format(format_key_path(keys), kind, WAY_OUT))
            for recipe in recipes
            for keys, node, kind in find_secret_values(recipe.tree)
        )
    )


def check_secrets(recipes: Iterable[Recipe]) -> None:
    """Check that no value looks like a secret. Raises RecipeError."""
    if problems := list_secret_problems(recipes):
        raise RecipeError(problems)
