"""Run a recipe or a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import EXIT_SUCCESS, AzrecipeError, build_error
from azrecipe.operations.selection import select_recipes
from azrecipe.pipeline import launch_command, preflight, worker
from azrecipe.pipeline.run_request import RunRequest
from azrecipe.pipeline.runner import check_order, check_run_dirs, run_steps, write_page
from azrecipe.recipe.load import Recipe
from azrecipe.runs.run_dir import locate_run, record_unreported_end
from azrecipe.runs.run_files import check_pipeline_folder


@dataclass(frozen=True)
class RunReport:
    """How a run ended.

    Attributes:
        recipe: The recipe or pipeline.
        path: Its run directory.
        exit_code: 0 after a success.
        error: The failure, which was printed; None after a success.
    """

    recipe: Recipe
    path: Path
    exit_code: int
    error: AzrecipeError | None = None


def run_recipe(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    step: str | None = None,
    cell: str | None = None,
    accelerate_config: str | None = None,
    num_processes: int | None = None,
    quiet: bool = False,
) -> RunReport:
    """Run a recipe or a pipeline; a run that was interrupted resumes.

    Progress is printed on stderr, and a pipeline's tables on stdout.

    Args:
        recipe: The path of a recipe or pipeline.
        overrides: KEY=VALUE, as `--set` takes them.
        runs_dir: The folder of run directories.
        step: The only step of a pipeline to run.
        cell: The only cell of a matrix to run.
        accelerate_config: A file in accelerate_configs/ by name, or a path. None: one process.
        num_processes: Processes to start on this machine.
        quiet: Whether a pipeline prints no table at its end.

    Returns:
        How the run ended. A failure of the run itself is printed and is part of the report.

    Raises:
        RecipeError: A recipe is wrong; nothing was started.
        CommandError: There is no such step, cell or config, or a run directory belongs to another recipe; nothing was started.
        CannotRun: This machine cannot run the recipe; nothing was started.
    """
    selection = select_recipes(recipe, overrides=overrides, step=step, cell=cell)
    opened, path = selection.recipe, locate_run(selection.recipe, runs_dir).path
    request = RunRequest(str(recipe), tuple(overrides), runs_dir, step, cell, accelerate_config, num_processes)
    config_file = launch_command.resolve_accelerate_config(accelerate_config) if accelerate_config else None
    launch = preflight.read_launch_config(config_file, num_processes)
    if opened.stage == "pipeline":
        check_order(opened, selection.steps, runs_dir)
        preflight.check_launch([one for one in selection.recipes if not locate_run(one, runs_dir).is_complete], launch)
        check_pipeline_folder(path)
        check_run_dirs(selection.steps, runs_dir)
        code = run_steps(opened, selection.steps, request, quiet=quiet)
        return _build_report(opened, path, code, f"{opened.path}: a step failed with exit code {code}")
    command = None
    if opened.stage in preflight.TRAINING_STAGES:
        command = launch_command.build_launch_command(request.build_arguments(step, cell), accelerate_config, num_processes)
    if command is None:
        result = worker.run_worker(str(selection.path), overrides, runs_dir, step, cell)
        report = RunReport(opened, path, result.exit_code, result.error)
    else:
        preflight.check_launch([opened], launch)
        child = launch_command.run_child(command, "the launcher")
        message = child.message or f"{opened.path}: ended with exit code {child.exit_code}"
        if child.exit_code != EXIT_SUCCESS:
            record_unreported_end(locate_run(opened, runs_dir), child.exit_code, message, is_known=child.names_rank)
        report = _build_report(opened, path, child.exit_code, message)
    if report.exit_code == EXIT_SUCCESS:
        write_page(path)
    return report


def _build_report(recipe: Recipe, path: Path, exit_code: int, message: str) -> RunReport:
    return RunReport(recipe, path, exit_code, None if exit_code == EXIT_SUCCESS else build_error(exit_code, message))
