"""The recipes that a path, a step and a cell select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import PipelineStep, find_upstream_references, open_recipe
from azrecipe.runs.run_dir import locate_named_run
from azrecipe.utils import shipped_files


@dataclass(frozen=True)
class RecipeSelection:
    """A recipe or pipeline, and the recipes that its run consists of.

    Attributes:
        path: The file that was selected from.
        recipe: The recipe, the pipeline, or the one step that was selected.
        steps: The steps of a pipeline; empty for a single recipe.
    """

    path: Path
    recipe: Recipe
    steps: tuple[PipelineStep, ...]

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes that are run: those of the steps, or the recipe."""
        return [step.recipe for step in self.steps] if self.recipe.stage == "pipeline" else [self.recipe]


def select_recipes(
    recipe: str | Path, *, overrides: Sequence[str] = (), step: str | None = None, cell: str | None = None
) -> RecipeSelection:
    """Open a recipe or a pipeline.

    Args:
        recipe: The path of a recipe or pipeline, also of one that comes with azrecipe.
        overrides: KEY=VALUE, as `--set` takes them.
        step: The only step of a pipeline to select.
        cell: The only cell of a matrix to select.

    Raises:
        RecipeError: A recipe or an override is wrong.
        CommandError: There is no such step or cell.
    """
    path = shipped_files.resolve_shipped_path(str(recipe))
    opened, steps = open_recipe(path, parse_overrides(overrides), step, cell)
    return RecipeSelection(path, opened, tuple(steps))


def list_unfinished_upstream(recipe: Recipe, runs_dir: Path) -> tuple[str, ...]:
    """List the upstream recipes that have no finished run."""
    names = dict.fromkeys(Path(output_of).name for _, output_of in find_upstream_references(recipe.data))
    return tuple(name for name in names if not locate_named_run(recipe, runs_dir, Path(name).stem).is_complete)
