"""Load and check a recipe; RecipeError reports all its problems."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from azrecipe.errors import Problem, RecipeError, SourceLocation, suggest_choices
from azrecipe.recipe import null_keys, schema
from azrecipe.recipe.compose import ComposedRecipe, compose_recipe, display_path
from azrecipe.recipe.dataclass_builder import build_dataclass
from azrecipe.recipe.overrides import Override
from azrecipe.recipe.rules import common
from azrecipe.recipe.types import STAGE_TYPES
from azrecipe.recipe.yaml_tree import Key, YamlNode, parse_yaml
from azrecipe.utils.paths import LOCAL_PATH_CHECKS

CELLS_FOLDER = "cells"  # a project's folder for the runs of a matrix, with one subfolder a cell


@dataclass(frozen=True)
class MatrixCell:
    """A cell of a pipeline's matrix."""

    name: str
    recipes: frozenset[str]  # names of the recipes that the cell runs for itself


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    path: Path
    stage: str
    data: Mapping[str, Any]  # the resolved recipe as plain data, with defaults
    config: Any  # the same as a dataclass of `recipe.types`
    tree: YamlNode  # the same with the location of each value
    used_variables: frozenset[str] = frozenset()  # names of the variables that values refer to
    cell: MatrixCell | None = None  # the cell of a matrix that runs the recipe

    @property
    def name(self) -> str:
        """The file's name without its suffix, which also names the run."""
        return self.path.stem

    @property
    def project(self) -> str:
        return str(self.data["project"])

    def find_cell(self, name: str) -> str | None:
        """Return the cell that contains the run `name`, as seen from here.

        Returns None for a run outside the cells.
        """
        return self.cell.name if self.cell and name in self.cell.recipes else None

    def locate(self, *keys: Key) -> SourceLocation:
        """Return the location of a value, or of its nearest parent."""
        return self.tree.find_nearest(keys).location

    def error(self, message: str, *keys: Key) -> RecipeError:
        """Return a RecipeError at a value, for problems that a stage finds."""
        return RecipeError([Problem(self.locate(*keys), message)])


def load_recipe(
    path: str | Path, overrides: Sequence[Override] = (), variables: Mapping[str, YamlNode] | None = None, project: str | None = None
) -> Recipe:
    """Load and check one recipe.

    Args:
        path: The recipe's file.
        overrides: Values that replace those of the recipe.
        variables: A pipeline's variables, which replace the recipe's own.
        project: A pipeline's project, which replaces the recipe's own.

    Raises:
        RecipeError: Every problem that can be found without torch and without a network.
    """
    path = Path(path)
    for override in overrides:
        if override.step is not None:
            raise RecipeError(
                [Problem(override.node.entry_location, f"{override.step}: names a step, and {display_path(path)} is run by itself")]
            )
    composed = compose_recipe(path, overrides, variables)
    if composed.is_fragment:
        raise RecipeError([Problem(SourceLocation(display_path(path)), "a fragment: it is only extended. Run a recipe that extends it")])
    if project is not None:
        composed = _with_project(composed, project)
    return build_recipe(path, composed)


def _with_project(composed: ComposedRecipe, project: str) -> ComposedRecipe:
    assert isinstance(composed.root.value, dict)
    location = SourceLocation("project, from the pipeline")
    return replace(composed, root=replace(composed.root, value={**composed.root.value, "project": YamlNode(project, location, location)}))


def build_recipe(path: Path, composed: ComposedRecipe) -> Recipe:
    """Check a merged tree by its stage's schema and rules.

    Returns the recipe. Raises RecipeError with every problem.
    """
    root = composed.root
    stage = get_stage(root)
    if path.stem == CELLS_FOLDER:
        message = f"a recipe cannot be called {path.name}: a project keeps the runs of a matrix in a folder of that name. Rename the file"
        raise RecipeError([Problem(SourceLocation(display_path(path)), message)])
    reported = {problem.location for problem in composed.problems}  # a second message about the same value says nothing new
    problems = [
        *composed.problems,
        *null_keys.check_null_keys(composed.null_keys, schema.load_schema(stage)),
        *(p for p in schema.check_schema(root, stage) + common.check_rules(root, stage) if p.location not in reported),
    ]
    if problems:
        raise RecipeError(_sort_problems(problems))
    tree = resolve_paths(root, schema.load_schema(stage))
    data = _to_resolved_data(tree, stage)
    return Recipe(path, stage, data, build_dataclass(STAGE_TYPES[stage], data), tree, composed.used_variables)


def _to_resolved_data(tree: YamlNode, stage: str) -> Any:
    data = schema.fill_defaults(tree, stage)
    for key in ("extends", "fragment", "variables"):
        data.pop(key, None)
    return data


def load_run_config(file: Path) -> Any:
    """Load the resolved recipe.yaml of a run as a dataclass.

    Its paths are relative to the folder in which the run was started.
    """
    tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    stage = get_stage(tree)
    return build_dataclass(STAGE_TYPES[stage], _to_resolved_data(tree, stage))


def get_stage(root: YamlNode) -> str:
    """Return the stage of a tree. Raises RecipeError for an unknown one."""
    node = root.get("stage")
    if node is None:
        message = f"missing key 'stage': one of {', '.join(schema.STAGES)} (a file that is only extended says `fragment: true`)"
        raise RecipeError([Problem(root.location, message)])
    if node.value not in schema.STAGES:
        raise RecipeError(
            [Problem(node.location, f"there is no stage '{node.value}'{suggest_choices(str(node.value), schema.STAGES, 'Stages')}")]
        )
    return str(node.value)


def _sort_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems in the order of their locations, each once."""
    return sorted(dict.fromkeys(problems), key=lambda p: (p.location.file, p.location.line, p.location.column))


def resolve_paths(node: YamlNode, definition: schema.Schema) -> YamlNode:
    """Return the tree with local paths relative to the working folder.

    In a recipe they are relative to the file that contains them.
    """
    definition = schema.resolve_ref(definition)
    if isinstance(node.value, dict):
        entries = {}
        for key, value in node.value.items():
            child = schema.subschema(definition, key)
            entries[key] = resolve_paths(value, child) if child is not None else value
        return replace(node, value=entries)
    if isinstance(node.value, list):
        child = schema.subschema(definition, 0)
        return replace(node, value=[resolve_paths(item, child) if child is not None else item for item in node.value])
    kind = definition.get("x-path")
    if kind is None or not isinstance(node.value, str):
        return node
    is_local = LOCAL_PATH_CHECKS[kind](node.value)
    return replace(node, value=relative_to_cwd(node.location, node.value)) if is_local else node


def relative_to_cwd(location: SourceLocation, path: str) -> str:
    """Return a path of a recipe relative to the working folder.

    A path from the command line is relative to the working folder already.
    """
    path = os.path.expanduser(path)
    base = os.path.dirname(location.file) if location.line else ""
    joined = os.path.normpath(os.path.join(base, path))
    is_explicit = os.path.isabs(joined) or joined.startswith("..") or (location.line == 0 and not path.startswith("."))
    return joined if is_explicit else f"./{joined}"  # without ./ it could be a hub id
