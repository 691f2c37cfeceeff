"""`azrecipe validate`: every problem of every recipe in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import Place, Problem, RecipeError
from azrecipe.recipe.compose import compose, read, shown
from azrecipe.recipe.load import from_composed
from azrecipe.recipe.overrides import Override
from azrecipe.recipe.pipeline_steps import lone_candidate, resolve


@dataclass(frozen=True)
class Report:
    """What validation found: recipes that are right, fragments that were checked through them, and every problem."""

    valid: list[str]
    fragments: list[str]
    problems: list[Problem]


def validate(paths: Sequence[Path], overrides: Sequence[Override] = ()) -> Report:
    """Check every recipe named; a folder means every recipe in it.

    A fragment is checked through the recipes that extend it; one that nothing here extends is checked for its YAML.
    """
    valid: list[str] = []
    fragments: dict[Path, bool] = {}
    problems: list[Problem] = []
    reached: set[Path] = set()
    for path in _files(paths, problems):
        try:
            composed = compose(path, [o for o in overrides if o.step is None])
            if composed.fragment:
                fragments[path.resolve()] = True
                continue
            reached |= {file.resolve() for file in composed.files}
            recipe = from_composed(path, composed)
            of_steps = [o for o in overrides if o.step is not None]
            if recipe.stage == "pipeline":
                wrong = resolve(recipe, of_steps)[1]
            else:
                wrong = [Problem(o.node.at, f"{o.step}: names a step, and {shown(path)} is no pipeline") for o in of_steps]
                wrong = wrong or lone_candidate(recipe)
            problems += wrong
            if not wrong:
                valid.append(shown(path))
        except RecipeError as error:
            if not _is_fragment(path):
                problems += error.problems
    for path in fragments:
        if path not in reached and len(paths) == 1 and paths[0].is_file():
            problems.append(
                Problem(
                    Place(shown(path)),
                    "a fragment: it is checked through the recipes that extend it. Validate one of those, or their folder",
                )
            )
    unique = list(dict.fromkeys(problems))
    return Report(valid, [shown(path) for path in fragments], unique)


def _is_fragment(path: Path) -> bool:
    """Whether a file calls itself a fragment; its variables may be undefined until a recipe extends it."""
    try:
        node = read(path).get("fragment")
    except RecipeError:
        return False
    return node is not None and node.value is True


def _files(paths: Sequence[Path], problems: list[Problem]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
            if not inside:
                problems.append(Problem(Place(shown(path)), "no recipe in this folder"))
            found.update(dict.fromkeys(inside))
        else:
            found[path] = None
    return list(found)
