"""Inheritance: a file and all that it extends, merged; variables and overrides put in. Places survive all of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from azrecipe.errors import Place, Problem, RecipeError, did_you_mean, hint
from azrecipe.recipe.overrides import Override
from azrecipe.recipe.yaml_tree import Key, Node, decode, parse

# Alternatives: the nearer file's choice drops the inherited one.
ALTERNATIVES = (
    frozenset({"name_or_path", "output_of", "config", "family"}),
    frozenset({"max_steps", "max_tokens", "max_bytes", "num_train_epochs"}),
)
_BELONGS = {"name_or_path": {"revision"}, "config": set(), "output_of": {"candidate"}, "family": {"vocab_size"}}
_CHANGES = {"set": 0, "matrix": 2}  # keys whose values change steps, and the levels above those changes: cell, step


@dataclass(frozen=True)
class Composed:
    """A recipe after inheritance: its merged tree, the files it came from (itself first), its variables, which of
    them its values take, and what is wrong with overrides and variables: told together with what the schema finds."""

    root: Node
    files: tuple[Path, ...]
    variables: Mapping[str, Node]
    used: frozenset[str]
    problems: tuple[Problem, ...]
    fragment: bool


def shown(path: Path) -> str:
    """A path as messages show it: relative to the working folder where it lies below it."""
    text = os.path.relpath(path)
    return str(path) if text.startswith("..") and path.is_absolute() else text


def read(path: Path) -> Node:
    """One file's own tree, nothing merged. Raises RecipeError for a file that is missing, unreadable or no mapping."""
    file = shown(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError([Problem(Place(file), "no such file" + _near_file(path))]) from None
    except OSError as error:
        raise RecipeError([Problem(Place(file), f"cannot be read: {error.strerror}")]) from None
    root = parse(decode(data, file), file)
    if not isinstance(root.value, dict):
        what = "is empty" if root.value is None else "must be a mapping of keys to values"
        raise RecipeError([Problem(root.place, f"the recipe {what}; it starts with `stage:`")])
    return root


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {shown(path.parent)})"
    return did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml")))


def chain(path: Path) -> list[tuple[Path, Node]]:
    """The file and its ancestors, nearest first. Raises RecipeError for a missing or cyclic `extends`."""
    found: list[tuple[Path, Node]] = []
    seen: list[Path] = []
    at: Node | None = None
    while True:
        path = Path(os.path.normpath(path))
        if path in seen:
            circle = " → ".join(p.name for p in [*seen[seen.index(path) :], path])
            raise RecipeError([Problem(at.place if at else Place(shown(path)), f"extends goes in a circle: {circle}")])
        if at is not None and not path.is_file():
            raise RecipeError([Problem(at.place, f"extends: no such file: {shown(path)}{_near_file(path)}")])
        seen.append(path)
        root = read(path)
        found.append((path, root))
        at = root.get("extends")
        if at is None or at.value is None:
            return found
        if not isinstance(at.value, str):
            raise RecipeError([Problem(at.place, "extends must be the path of one recipe")])
        path = path.parent / at.value


def merge(parent: Node, child: Node, keep_nulls: bool = False) -> Node:
    """The child over the parent: mappings merge, lists and scalars replace, null removes.

    Below a pipeline's `set` and `matrix` a null is kept: it is the step's key that it removes.
    """
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    dropped = _dropped(child.value)
    merged = {key: node for key, node in parent.value.items() if key not in dropped}
    for key, node in child.value.items():
        if node.value is None and not keep_nulls:
            merged.pop(key, None)
        elif key in merged:
            merged[key] = merge(merged[key], node, keep_nulls or key in _CHANGES)
        else:
            merged[key] = node
    return replace(child, value=merged)


def _dropped(chosen: Mapping[str, Node]) -> set[str]:
    """Inherited keys that the child's choice among alternatives makes void."""
    dropped: set[str] = set()
    for group in ALTERNATIVES:
        mine = {key for key in group if key in chosen and chosen[key].value is not None}
        if mine:
            others = group - mine
            dropped |= others
            for other in others:
                dropped |= _BELONGS.get(other, set()) - set(chosen)
    return dropped


def without_nulls(node: Node, levels: int = 99) -> Node:
    """The tree, so many levels down, without keys whose value is null: they removed what they had to remove."""
    if levels == 0:
        return node
    if isinstance(node.value, dict):
        kept = {key: below for key, below in node.value.items() if below.value is not None}
        return replace(node, value={key: without_nulls(below, _CHANGES.get(key, levels - 1)) for key, below in kept.items()})
    if isinstance(node.value, list):
        return replace(node, value=[without_nulls(item, levels) for item in node.value])
    return node


def compose(
    path: Path,
    overrides: Sequence[Override] = (),
    variables: Mapping[str, Node] | None = None,
) -> Composed:
    """Merge a file with its ancestors, apply overrides, put variables in.

    `variables` come from a pipeline and win over the recipe's own; names that the recipe does not declare are left
    out (the pipeline checks that some step declares them). Raises RecipeError for files that cannot be read or merged.
    """
    files = chain(path)
    merged = files[-1][1]
    for _, node in reversed(files[:-1]):
        merged = merge(merged, node)
    problems: list[Problem] = []
    for override in overrides:
        try:
            merged = put(merged, override.keys, override.node)
        except RecipeError as error:
            problems.extend(error.problems)
    merged = without_nulls(merged)
    declared = _variables(merged)
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
        *_undeclared(files, overrides, substitution.used | _mentioned(files)),
        *_nested(declared),
    ]
    fragment = files[0][1].get("fragment")
    return Composed(
        root=replace(merged, value=body),
        files=tuple(p for p, _ in files),
        variables=declared,
        used=frozenset(substitution.used),
        problems=tuple(problems),
        fragment=bool(fragment and fragment.value),
    )


def _variables(root: Node) -> dict[str, Node]:
    node = root.get("variables")
    return dict(node.value) if node and isinstance(node.value, dict) else {}


def _nested(declared: Mapping[str, Node]) -> list[Problem]:
    message = "variable '{}' takes another variable: a variable's value is a plain one. Use the other where this one is used"
    return [
        Problem(node.place, message.format(name))
        for name, node in declared.items()
        if isinstance(node.value, str) and "${" in node.value.replace("$${", "")
    ]


def _mentioned(files: list[tuple[Path, Node]]) -> set[str]:
    """Variables that stand in any of the files, also in a value that is replaced further down or on the command line."""
    every = _Substitution({})
    for _, root in files:
        every.apply(root)
    return every.used


def _undeclared(files: list[tuple[Path, Node]], overrides: Sequence[Override], used: set[str]) -> list[Problem]:
    """Variables that are set, though no ancestor declares and no value takes them: a misspelling, most likely."""
    if any(node.value == "pipeline" for _, root in files if (node := root.get("stage"))):
        return []  # a pipeline's variables are its steps'; recipe.rules checks them there
    every = {name for _, root in files for name in _variables(root)}
    sets = [(str(o.keys[1]), o.node.at, every) for o in overrides if o.keys[0] == "variables" and len(o.keys) > 1]
    for i, (_, root) in enumerate(files[:-1]):
        inherited = {name for _, ancestor in files[i + 1 :] for name in _variables(ancestor)}
        sets += [(name, node.at, inherited) for name, node in _variables(root).items()]
    problems = []
    for name, place, known in sets:
        if name not in known and name not in used:
            tail = hint(name, known, "Declared") if known else ""
            problems.append(Problem(place, f"variable '{name}' is declared by nothing and used by nothing{tail}"))
    return problems


def put(root: Node, keys: tuple[Key, ...], node: Node) -> Node:
    """The tree with one value put at a path. Mappings on the way are made; list positions must exist."""
    key, rest = keys[0], keys[1:]
    if isinstance(key, int):
        if not isinstance(root.value, list) or key >= len(root.value):
            size = f"it has {len(root.value)}" if isinstance(root.value, list) else "it is no list"
            raise RecipeError([Problem(node.at, f"there is no element [{key}]: {size}")])
        items = list(root.value)
        items[key] = put(items[key], rest, node) if rest else node
        return replace(root, value=items)
    if not isinstance(root.value, dict):
        raise RecipeError([Problem(node.at, f"cannot set '{key}': the value above it is no mapping")])
    entries = dict(root.value)
    if not rest:
        if isinstance(node.value, dict) and key in entries:
            node = merge(entries[key], node)
        for gone in _dropped({key: node}):
            entries.pop(gone, None)
        entries[key] = node
    else:
        below = entries.get(key) or Node({}, node.place, node.at)
        entries[key] = replace(put(below, rest, node), key_place=below.key_place)
    return replace(root, value=entries)


class _Substitution:
    """Puts variables where `${name}` stands; `$${` is a literal `${`. A value that is only ${name} keeps its type."""

    _PATTERN = re.compile(r"\$\$\{|\$\{([^}]*)\}")

    def __init__(self, variables: Mapping[str, Node]) -> None:
        self.variables = variables
        self.used: set[str] = set()
        self.problems: list[Problem] = []

    def apply(self, node: Node) -> Node:
        if isinstance(node.value, dict):
            return replace(node, value={key: self.apply(below) for key, below in node.value.items()})
        if isinstance(node.value, list):
            return replace(node, value=[self.apply(item) for item in node.value])
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        whole = re.fullmatch(r"\$\{([^}]*)\}", node.value)
        if whole:
            found = self.variables.get(whole[1], node)  # a path is relative to where the variable was given its value
            return replace(node, value=self._take(whole[1], node), place=found.place)
        return replace(node, value=self._PATTERN.sub(lambda m: "${" if m[1] is None else str(self._take(m[1], node)), node.value))

    def _take(self, name: str, node: Node) -> str | int | float | bool | None:
        self.used.add(name)
        found = self.variables.get(name)
        if found is None:
            tail = hint(name, self.variables, "Declared") if self.variables else ". This recipe declares no variables"
            self.problems.append(Problem(node.place, f"variable '{name}' is not defined{tail}"))
            return ""
        if isinstance(found.value, (dict, list)):
            kind = "a list" if isinstance(found.value, list) else "a mapping"
            self.problems.append(Problem(found.place, f"variable '{name}' must be text, a number, true or false, not {kind}"))
            return ""
        return found.value
