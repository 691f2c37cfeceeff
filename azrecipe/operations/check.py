"""Check recipes: refuse what a run would refuse, without weights or a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import explain_error
from azrecipe.operations.check_preview import PretrainPreview, SftPreview, build_pretrain_preview, build_sft_preview
from azrecipe.operations.selection import list_unfinished_upstream, select_recipes
from azrecipe.pipeline import preflight
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.stage_outputs import FindOutput, describe_output, follow_steps
from azrecipe.runs.run_dir import locate_run
from azrecipe.runs.run_files import check_pipeline_folder, check_run_folder


@dataclass(frozen=True)
class RecipeCheck:
    """How one recipe was checked.

    Attributes:
        path: The recipe.
        stage: Its stage.
        missing_runs: Recipes of a pipeline that this one takes from and that have no finished run. With one, what depends on the
            tokens and weights of those runs was not checked.
        preview: What it will be trained on; None for other stages, and where only the file was checked.
    """

    path: Path
    stage: str
    missing_runs: tuple[str, ...] = ()
    preview: PretrainPreview | SftPreview | None = None

    @property
    def is_complete(self) -> bool:
        """Whether everything was checked."""
        return not self.missing_runs


@dataclass(frozen=True)
class CheckReport:
    """The checks of a recipe, or of a pipeline's recipes in order."""

    recipes: tuple[RecipeCheck, ...]

    @property
    def is_complete(self) -> bool:
        """Whether everything was checked."""
        return all(check.is_complete for check in self.recipes)


def check_recipes(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    step: str | None = None,
    cell: str | None = None,
    on_check: Callable[[RecipeCheck], None] | None = None,
) -> CheckReport:
    """Check a recipe, or the recipes of a pipeline.

    Args:
        recipe: The path of a recipe or pipeline.
        overrides: KEY=VALUE, as `--set` takes them.
        runs_dir: The folder of run directories.
        step: The only step of a pipeline to check.
        cell: The only cell of a matrix to check.
        on_check: Called with each check as soon as it is done.

    Returns:
        The checks, none of which found a problem.

    Raises:
        RecipeError: A recipe is wrong, or its data cannot be trained on.
        CommandError: There is no such step or cell, or a run directory holds other files.
        CannotRun: This machine lacks a package, memory, disk space or a network.
    """
    selection = select_recipes(recipe, overrides=overrides, step=step, cell=cell)
    recipes = selection.recipes
    preflight.check_local_files(recipes)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warn about each other
    for one in [selection.recipe, *recipes]:
        check_folder = check_pipeline_folder if one.stage == "pipeline" else check_run_folder
        check_folder(locate_run(one, runs_dir).path)
    checks = []
    for one, find_output in follow_steps(recipes):
        missing_runs = list_unfinished_upstream(one, runs_dir) if len(recipes) > 1 else ()
        try:
            if missing_runs:
                _check_planned_stage(one, runs_dir, find_output)
            check = RecipeCheck(one.path, one.stage, missing_runs, None if missing_runs else _check_stage(one, runs_dir))
        except (OSError, MemoryError) as error:
            raise explain_error(error) or error from None
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return CheckReport(tuple(checks))


def _check_stage(recipe: Recipe, runs_dir: Path) -> PretrainPreview | SftPreview | None:
    """Call the check of a recipe's stage."""
    from azrecipe.data.inputs import Inputs
    from azrecipe.stages import evaluate, merge, pretrain, sft, tokenizer

    if recipe.stage == "merge":
        merge.check(recipe, Inputs(recipe, runs_dir))
    if recipe.stage == "tokenizer":
        tokenizer.check(recipe, Inputs(recipe, runs_dir))
    if recipe.stage == "sft":
        return build_sft_preview(sft.check(recipe, Inputs(recipe, runs_dir)))
    if recipe.stage == "pretrain":
        return build_pretrain_preview(recipe, pretrain.check(recipe, runs_dir))
    if recipe.stage == "evaluate":
        evaluate.check(recipe, Inputs(recipe, runs_dir))
    return None


def _check_planned_stage(recipe: Recipe, runs_dir: Path, find_output: FindOutput) -> None:
    """Check a step, as deep as its unfinished upstream recipes tell."""
    from azrecipe.data.inputs import Inputs
    from azrecipe.stages import pretrain, sft, tokenizer

    inputs, config = Inputs(recipe, runs_dir), recipe.config
    if recipe.stage == "tokenizer":
        tokenizer.check_planned(recipe, inputs)
    elif recipe.stage == "evaluate":
        for error in preflight.iter_evaluation_problems(recipe):
            raise error
        inputs.read_validation(config.data.validation)
    elif recipe.stage == "sft":
        upstream = find_output(config.model.output_of) if config.model.output_of is not None else None
        sft.check_planned(recipe, inputs, upstream)
    elif recipe.stage == "pretrain":
        pretrain.check_planned(recipe, inputs, describe_output(recipe, find_output))
