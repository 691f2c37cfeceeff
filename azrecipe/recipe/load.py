"""The front door: a path and overrides in, a checked Recipe out, or RecipeError with all that is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from azrecipe.errors import Place, Problem, RecipeError, hint
from azrecipe.recipe import schema
from azrecipe.recipe.compose import Composed, compose, shown
from azrecipe.recipe.dataclass_builder import build
from azrecipe.recipe.overrides import Override
from azrecipe.recipe.rules import common
from azrecipe.recipe.types import STAGE_TYPES
from azrecipe.recipe.yaml_tree import Key, Node, parse
from azrecipe.utils.paths import LOCAL

CELLS = "cells"  # the folder of a project that holds the runs of a matrix' cells, one folder a cell


@dataclass(frozen=True)
class Cell:
    """A cell of a pipeline's matrix: its name, and the names of the recipes that it repeats, whose runs are its own."""

    name: str
    recipes: frozenset[str]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    `data` is the resolved recipe as plain data, defaults filled in; `config` the same as a dataclass of
    `recipe.types`; `tree` knows where each value was written, `used` names the variables that values take; `cell`
    is the cell of a matrix that it is looked at from, if any.
    """

    path: Path
    stage: str
    data: Mapping[str, Any]
    config: Any
    tree: Node
    used: frozenset[str] = frozenset()
    cell: Cell | None = None

    @property
    def name(self) -> str:
        """The file's name without its ending: also the name of its run."""
        return self.path.stem

    @property
    def project(self) -> str:
        return str(self.data["project"])

    def cell_of(self, name: str) -> str | None:
        """The cell that has the run of the recipe called `name`, seen from here; None for a run that is no cell's own."""
        return self.cell.name if self.cell and name in self.cell.recipes else None

    def place(self, *keys: Key) -> Place:
        """Where a value was written, or the nearest thing above it."""
        return self.tree.nearest(keys).place

    def problem(self, message: str, *keys: Key) -> RecipeError:
        """A RecipeError that points at a value, for what only a stage can find."""
        return RecipeError([Problem(self.place(*keys), message)])


def load(
    path: str | Path, overrides: Sequence[Override] = (), variables: Mapping[str, Node] | None = None, project: str | None = None
) -> Recipe:
    """Load and check one recipe.

    `variables` and `project` come from a pipeline and win over the recipe's own. Raises RecipeError with every
    problem that can be found without torch and without a network.
    """
    path = Path(path)
    for override in overrides:
        if override.step is not None:
            raise RecipeError([Problem(override.node.at, f"{override.step}: names a step, and {shown(path)} is run by itself")])
    composed = compose(path, overrides, variables)
    if composed.fragment:
        raise RecipeError([Problem(Place(shown(path)), "a fragment: it is only extended. Run a recipe that extends it")])
    if project is not None:
        composed = _with_project(composed, project)
    return from_composed(path, composed)


def _with_project(composed: Composed, project: str) -> Composed:
    assert isinstance(composed.root.value, dict)
    at = Place("project, from the pipeline")
    return replace(composed, root=replace(composed.root, value={**composed.root.value, "project": Node(project, at, at)}))


def from_composed(path: Path, composed: Composed) -> Recipe:
    """Check a merged tree against its stage's schema and rules, and make it a Recipe."""
    root = composed.root
    stage = stage_of(root)
    if path.stem == CELLS:
        message = f"a recipe cannot be called {path.name}: a project keeps the runs of a matrix in a folder of that name. Rename the file"
        raise RecipeError([Problem(Place(shown(path)), message)])
    broken = {problem.place for problem in composed.problems}  # what the schema says of a value that is not there is no news
    problems = [*composed.problems, *(p for p in schema.check(root, stage) + common.check(root, stage) if p.place not in broken)]
    if problems:
        raise RecipeError(_unique(problems))
    tree = resolve_paths(root, schema.document(stage))
    data = _finished(tree, stage)
    return Recipe(path, stage, data, build(STAGE_TYPES[stage], data), tree, composed.used)


def _finished(tree: Node, stage: str) -> Any:
    data = schema.finish(tree, stage)
    for key in ("extends", "fragment", "variables"):
        data.pop(key, None)
    return data


def of_run(file: Path) -> Any:
    """The dataclass of a run's recipe.yaml, which is resolved already: its paths are relative to where that run was started."""
    tree = parse(file.read_text(encoding="utf-8"), str(file))
    stage = stage_of(tree)
    return build(STAGE_TYPES[stage], _finished(tree, stage))


def stage_of(root: Node) -> str:
    """The stage that a tree names, which must be known."""
    node = root.get("stage")
    if node is None:
        raise RecipeError(
            [
                Problem(
                    root.place,
                    f"missing key 'stage': one of {', '.join(schema.STAGES)} (a file that is only extended says `fragment: true`)",
                )
            ]
        )
    if node.value not in schema.STAGES:
        raise RecipeError([Problem(node.place, f"there is no stage '{node.value}'{hint(str(node.value), schema.STAGES, 'Stages')}")])
    return str(node.value)


def _unique(problems: Sequence[Problem]) -> list[Problem]:
    return sorted(dict.fromkeys(problems), key=lambda p: (p.place.file, p.place.line, p.place.column))


def resolve_paths(node: Node, definition: schema.Schema) -> Node:
    """Every relative path made relative to the working folder, from the file that it stands in."""
    definition = schema.follow(definition)
    if isinstance(node.value, dict):
        entries = {}
        for key, value in node.value.items():
            inner = schema.below(definition, key)
            entries[key] = resolve_paths(value, inner) if inner is not None else value
        return replace(node, value=entries)
    if isinstance(node.value, list):
        inner = schema.below(definition, 0)
        return replace(node, value=[resolve_paths(item, inner) if inner is not None else item for item in node.value])
    kind = definition.get("x-path")
    if kind is None or not isinstance(node.value, str):
        return node
    local = LOCAL[kind](node.value)
    return replace(node, value=beside(node.place, node.value)) if local else node


def beside(place: Place, path: str) -> str:
    """A path that stands in a file, seen from the working folder. From the command line it is taken as it is."""
    path = os.path.expanduser(path)
    base = os.path.dirname(place.file) if place.line else ""
    joined = os.path.normpath(os.path.join(base, path))
    # a bare name would read as a hub id
    return joined if os.path.isabs(joined) or joined.startswith("..") or (place.line == 0 and not path.startswith(".")) else f"./{joined}"
