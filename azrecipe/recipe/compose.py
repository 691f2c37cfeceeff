"""Merge a recipe with the files that it extends.

Overrides and variables are applied too. Each value keeps its location.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from azrecipe.errors import Problem, RecipeError, SourceLocation, did_you_mean, suggest_choices
from azrecipe.recipe.null_keys import NullKey, drop_nulls, find_null_keys
from azrecipe.recipe.overrides import Override
from azrecipe.recipe.yaml_tree import Key, YamlNode, decode_utf8, parse_yaml
from azrecipe.utils.paths import is_file, is_folder

# A file that sets one key of a group drops the inherited other keys.
EXCLUSIVE_KEYS = (
    frozenset({"name_or_path", "output_of", "config", "family"}),
    frozenset({"max_steps", "max_tokens", "max_bytes", "num_train_epochs"}),
)
_DEPENDENT_KEYS = {"name_or_path": {"revision"}, "config": set(), "output_of": {"candidate"}, "family": {"vocab_size"}}


@dataclass(frozen=True)
class ComposedRecipe:
    """A recipe after inheritance."""

    root: YamlNode  # the merged tree
    files: tuple[Path, ...]  # the recipe itself first, then its ancestors
    variables: Mapping[str, YamlNode]
    used_variables: frozenset[str]  # names of the variables that values refer to
    problems: tuple[Problem, ...]  # of overrides and variables; reported together with those of the schema
    is_fragment: bool  # a fragment is only extended, never run
    null_keys: tuple[NullKey, ...]  # they are not in `root`


def display_path(path: Path) -> str:
    """Return a path for messages, relative to the working folder.

    A path outside the working folder is returned unchanged if it is absolute.
    """
    text = os.path.relpath(path)
    text = str(path) if text.startswith("..") and path.is_absolute() else text
    return text.replace("\n", "\\n").replace("\r", "\\r")


def read_tree(path: Path) -> YamlNode:
    """Return the tree of one file, without its ancestors.

    Raises RecipeError for a file that is missing, unreadable or no mapping.
    """
    file = display_path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError([Problem(SourceLocation(file), "no such file" + _suggest_file(path))]) from None
    except OSError as error:
        raise RecipeError([Problem(SourceLocation(file), f"cannot be read: {error.strerror}")]) from None
    root = parse_yaml(decode_utf8(data, file), file)
    if not isinstance(root.value, dict):
        reason = "is empty" if root.value is None else "must be a mapping of keys to values (key: value)"
        raise RecipeError([Problem(root.location, f"the recipe {reason}; it starts with `stage:`")])
    return root


def _suggest_file(path: Path) -> str:
    if not is_folder(path.parent):
        return f" (nor the folder {display_path(path.parent)})"
    return did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml")))


def load_ancestry(path: Path) -> list[tuple[Path, YamlNode]]:
    """Return a file and its ancestors with their trees, nearest first.

    Raises RecipeError for an `extends` that is missing or goes in a circle.
    """
    trees: list[tuple[Path, YamlNode]] = []
    paths: list[Path] = []
    extends: YamlNode | None = None
    while True:
        path = Path(os.path.normpath(path))
        if path in paths:
            circle = " → ".join(p.name for p in [*paths[paths.index(path) :], path])
            raise RecipeError(
                [Problem(extends.location if extends else SourceLocation(display_path(path)), f"extends goes in a circle: {circle}")]
            )
        if extends is not None and not is_file(path):
            raise RecipeError([Problem(extends.location, f"extends: no such file: {display_path(path)}{_suggest_file(path)}")])
        paths.append(path)
        root = read_tree(path)
        trees.append((path, root))
        extends = root.get("extends")
        if extends is None or extends.value is None:
            return trees
        if not isinstance(extends.value, str):
            raise RecipeError([Problem(extends.location, "extends must be the path of one recipe")])
        path = path.parent / extends.value


def merge_nodes(parent: YamlNode, child: YamlNode) -> YamlNode:
    """Merge a child over its parent.

    Mappings merge, lists and scalars replace. A null replaces too, and stays until all files are merged.
    """
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    dropped = _list_dropped_keys(child.value)
    merged = {key: node for key, node in parent.value.items() if key not in dropped}
    for key, node in child.value.items():
        merged[key] = merge_nodes(merged[key], node) if key in merged else node
    return replace(child, value=merged)


def _list_dropped_keys(child: Mapping[str, YamlNode]) -> set[str]:
    """Return the inherited keys that the child's exclusive keys drop."""
    dropped: set[str] = set()
    for group in EXCLUSIVE_KEYS:
        child_keys = {key for key in group if key in child and child[key].value is not None}
        if child_keys:
            others = group - child_keys
            dropped |= others
            for other in others:
                dropped |= _DEPENDENT_KEYS.get(other, set()) - set(child)
    return dropped


def compose_recipe(
    path: Path,
    overrides: Sequence[Override] = (),
    variables: Mapping[str, YamlNode] | None = None,
) -> ComposedRecipe:
    """Merge a file with its ancestors, apply overrides, insert variables.

    Args:
        path: The recipe.
        overrides: Values that replace those of the recipe.
        variables: Values from a pipeline, which replace the recipe's own. Names that the recipe does not declare are ignored;
            the pipeline checks that a step declares them.

    Raises:
        RecipeError: A file cannot be read or merged.
    """
    files = load_ancestry(path)
    merged = files[-1][1]
    for _, node in reversed(files[:-1]):
        merged = merge_nodes(merged, node)
    problems: list[Problem] = []
    for override in overrides:
        if override.keys[0] in ("extends", "fragment"):  # they are read from the file, before it is changed
            problems.append(
                Problem(override.node.entry_location, f"{override.keys[0]} cannot be changed from outside: write it in the file")
            )
            continue
        try:
            merged = set_at_path(merged, override.keys, override.node)
        except RecipeError as error:
            problems.extend(error.problems)
    inherited = [*(((), root) for _, root in files), *((override.keys, override.node) for override in overrides)]
    null_keys = find_null_keys(merged, inherited)
    merged = drop_nulls(merged)
    declared = _get_variables(merged)
    for name, node in (variables or {}).items():
        if name in declared:
            declared[name] = node
    substitution = _Substitution(declared)
    assert isinstance(merged.value, dict)
    body = {k: substitution.apply(n) for k, n in merged.value.items() if k != "variables"}
    if "variables" in merged.value:
        body["variables"] = merged.value["variables"]
    problems += [
        *dict.fromkeys(substitution.problems),
        *_check_declared(files, overrides, substitution.used | _list_referenced_variables(files)),
        *_check_plain_variables(declared),
    ]
    fragment = files[0][1].get("fragment")
    return ComposedRecipe(
        root=replace(merged, value=body),
        files=tuple(p for p, _ in files),
        variables=declared,
        used_variables=frozenset(substitution.used),
        problems=tuple(problems),
        is_fragment=bool(fragment and fragment.value),
        null_keys=null_keys,
    )


def _get_variables(root: YamlNode) -> dict[str, YamlNode]:
    node = root.get("variables")
    return dict(node.value) if node and isinstance(node.value, dict) else {}


def _check_plain_variables(declared: Mapping[str, YamlNode]) -> list[Problem]:
    message = "variable '{}' takes another variable: a variable's value is a plain one. Use the other where this one is used"
    return [
        Problem(node.location, message.format(name))
        for name, node in declared.items()
        if isinstance(node.value, str) and "${" in node.value.replace("$${", "")
    ]


def _list_referenced_variables(files: list[tuple[Path, YamlNode]]) -> set[str]:
    """Return the variables in any file, also in values that are replaced."""
    substitution = _Substitution({})
    for _, root in files:
        substitution.apply(root)
    return substitution.used


def _check_declared(files: list[tuple[Path, YamlNode]], overrides: Sequence[Override], used: set[str]) -> list[Problem]:
    """Find variables that are set but not declared and not used.

    They are most likely misspelt.
    """
    if any(node.value == "pipeline" for _, root in files if (node := root.get("stage"))):
        return []  # its variables belong to its steps: recipe.pipeline_steps checks them
    all_names = {name for _, root in files for name in _get_variables(root)}
    settings = [(str(o.keys[1]), o.node.entry_location, all_names) for o in overrides if o.keys[0] == "variables" and len(o.keys) > 1]
    for i, (_, root) in enumerate(files[:-1]):
        inherited = {name for _, ancestor in files[i + 1 :] for name in _get_variables(ancestor)}
        settings += [(name, node.entry_location, inherited) for name, node in _get_variables(root).items()]
    problems = []
    for name, location, declared in settings:
        if name not in declared and name not in used:
            advice = suggest_choices(name, declared, "Declared") if declared else ""
            problems.append(Problem(location, f"variable '{name}' is declared by nothing and used by nothing{advice}"))
    return problems


def set_at_path(root: YamlNode, keys: tuple[Key, ...], node: YamlNode) -> YamlNode:
    """Return the tree with one value set at a path of keys.

    Missing mappings on the path are created. Elements of lists must exist; otherwise RecipeError is raised.
    """
    key, rest = keys[0], keys[1:]
    if isinstance(key, int):
        if not isinstance(root.value, list) or key >= len(root.value):
            size = f"it has {len(root.value)}" if isinstance(root.value, list) else "it is no list"
            raise RecipeError([Problem(node.entry_location, f"there is no element [{key}]: {size}")])
        items = list(root.value)
        items[key] = set_at_path(items[key], rest, node) if rest else node
        return replace(root, value=items)
    if not isinstance(root.value, dict):
        raise RecipeError([Problem(node.entry_location, f"cannot set '{key}': the value above it is no mapping")])
    entries = dict(root.value)
    if not rest:
        if isinstance(node.value, dict) and key in entries:
            node = merge_nodes(entries[key], node)
        for dropped in _list_dropped_keys({key: node}):
            entries.pop(dropped, None)
        entries[key] = node
    else:
        child = entries.get(key)
        if child is None or child.value is None:
            child = YamlNode({}, node.location, node.entry_location)
        entries[key] = replace(set_at_path(child, rest, node), key_location=child.key_location)
    return replace(root, value=entries)


class _Substitution:
    """Replaces `${name}` by the value of a variable.

    `$${` is a literal `${`. A value that is only `${name}` keeps its type.
    """

    _PATTERN = re.compile(r"\$\$\{|\$\{([^}]*)\}")

    def __init__(self, variables: Mapping[str, YamlNode]) -> None:
        self.variables = variables
        self.used: set[str] = set()
        self.problems: list[Problem] = []

    def apply(self, node: YamlNode) -> YamlNode:
        if isinstance(node.value, dict):
            return replace(node, value={key: self.apply(child) for key, child in node.value.items()})
        if isinstance(node.value, list):
            return replace(node, value=[self.apply(item) for item in node.value])
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        match = re.fullmatch(r"\$\{([^}]*)\}", node.value)
        if match:
            source = self.variables.get(match[1], node)  # a path is relative to the file that sets the variable
            return replace(node, value=self._look_up(match[1], node), location=source.location)
        return replace(node, value=self._PATTERN.sub(lambda m: "${" if m[1] is None else str(self._look_up(m[1], node)), node.value))

    def _look_up(self, name: str, node: YamlNode) -> str | int | float | bool | None:
        self.used.add(name)
        variable = self.variables.get(name)
        if variable is None:
            advice = suggest_choices(name, self.variables, "Declared") if self.variables else ". This recipe declares no variables"
            self.problems.append(Problem(node.location, f"variable '{name}' is not defined{advice}"))
            return ""
        if isinstance(variable.value, (dict, list)):
            kind = "a list" if isinstance(variable.value, list) else "a mapping"
            self.problems.append(Problem(variable.location, f"variable '{name}' must be text, a number, true or false, not {kind}"))
            return ""
        return variable.value
