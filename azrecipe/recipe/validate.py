"""Find every problem of the recipes in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import Problem, RecipeError, SourceLocation
from azrecipe.recipe.compose import compose_recipe, display_path, read_tree
from azrecipe.recipe.load import build_recipe
from azrecipe.recipe.overrides import Override
from azrecipe.recipe.pipeline_steps import check_upstream, resolve_steps
from azrecipe.recipe.secrets import list_secret_problems
from azrecipe.utils.paths import is_file, is_folder


@dataclass(frozen=True)
class ValidationReport:
    """The result of a validation."""

    valid: list[str]  # recipes without problems
    fragments: list[str]  # files that are checked through the recipes that extend them
    problems: list[Problem]


def validate_recipes(paths: Sequence[Path], overrides: Sequence[Override] = ()) -> ValidationReport:
    """Check every recipe in files and folders.

    A fragment is checked through the recipes that extend it. If none of the recipes extends it, only its YAML is checked.
    """
    valid: list[str] = []
    fragments: dict[Path, bool] = {}
    problems: list[Problem] = []
    extended: set[Path] = set()
    for path in _list_files(paths, problems):
        try:
            composed = compose_recipe(path, [o for o in overrides if o.step is None])
            if composed.is_fragment:
                fragments[path.resolve()] = True
                continue
            extended |= {file.resolve() for file in composed.files}
            recipe = build_recipe(path, composed)
            step_overrides = [o for o in overrides if o.step is not None]
            recipes = [recipe]
            if recipe.stage == "pipeline":
                steps, recipe_problems = resolve_steps(recipe, step_overrides)
                recipes += [step.recipe for step in steps]
            else:
                message = f"names a step, and {display_path(path)} is no pipeline"
                recipe_problems = [Problem(o.node.entry_location, f"{o.step}: {message}") for o in step_overrides]
                recipe_problems = recipe_problems or check_upstream(recipe)
            recipe_problems = [*recipe_problems, *list_secret_problems(recipes)]
            problems += recipe_problems
            if not recipe_problems:
                valid.append(display_path(path))
        except RecipeError as error:
            if not _is_fragment(path):
                problems += error.problems
    for path in fragments:
        if path not in extended and len(paths) == 1 and is_file(paths[0]):
            message = "a fragment: it is checked through the recipes that extend it. Validate one of those, or their folder"
            problems.append(Problem(SourceLocation(display_path(path)), message))
    unique = list(dict.fromkeys(problems))
    return ValidationReport(valid, [display_path(path) for path in fragments], unique)


def _is_fragment(path: Path) -> bool:
    """Whether a file is a fragment.

    Its variables may be undefined until a recipe extends it.
    """
    try:
        node = read_tree(path).get("fragment")
    except RecipeError:
        return False
    return node is not None and node.value is True


def _list_files(paths: Sequence[Path], problems: list[Problem]) -> list[Path]:
    """Return the recipes in files and folders.

    Adds a problem for a folder without recipes.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if is_folder(path):
            recipes = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
            if not recipes:
                problems.append(Problem(SourceLocation(display_path(path)), "no recipe in this folder"))
            files.update(dict.fromkeys(recipes))
        else:
            files[path] = None
    return list(files)
