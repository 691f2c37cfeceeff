"""Run the steps of a pipeline, each in its own processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from azrecipe.errors import EXIT_SIGINT, EXIT_SIGTERM, EXIT_SUCCESS, CommandError, Problem, RecipeError, list_choices
from azrecipe.pipeline import launch_command, matrix_ranking
from azrecipe.pipeline.run_request import RunRequest
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import PipelineStep, find_upstream_references, group_by_cell, load_pipeline
from azrecipe.report import page, terminal_tables
from azrecipe.runs.reader import STEPS_FILE
from azrecipe.runs.run_dir import (
    check_run_matches,
    find_candidate_folder,
    locate_named_run,
    locate_run,
    record_unreported_end,
    write_recipe_files,
)
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.console import print_progress
from azrecipe.utils.environment_variables import PAGE
from azrecipe.utils.python_command import build_python_command


def _write_steps_file(recipe: Recipe, steps: Sequence[PipelineStep], request: RunRequest) -> None:
    """Write a pipeline's recipe and the paths of its runs."""
    run_dir = locate_run(recipe, request.runs_dir)
    if request.cell:  # the page shows all cells
        steps = load_pipeline(recipe.path, parse_overrides(request.overrides))[1]
    runs = [os.path.relpath(locate_run(step.recipe, request.runs_dir).path, run_dir.path.parent) for step in steps]
    content = {"steps": [{"step": step.key, "cell": step.cell, "run": run} for step, run in zip(steps, runs, strict=True)]}
    with contextlib.suppress(OSError):  # the steps report a folder that cannot be written
        if read_json(run_dir.path / STEPS_FILE) != content:
            write_json(run_dir.path / STEPS_FILE, content)  # first: it marks the folder as azrecipe's
        write_recipe_files(recipe, run_dir)


def write_page(run: Path) -> None:
    """Write a run's report.html, unless AZRECIPE_PAGE=0.

    A failure is printed, and does not fail the run.
    """
    try:
        if PAGE.read() != "0" and run.is_dir() and not page.is_page_fresh(run):
            page.write_page(run)
    except Exception as error:
        print_progress(f"azrecipe: {run / 'report.html'} could not be made: {error!r}")


def run_steps(recipe: Recipe, steps: Sequence[PipelineStep], request: RunRequest, *, quiet: bool = False) -> int:
    """Run the steps in order; return the exit code.

    A failure ends the pipeline; in a cell of a matrix, it ends that cell. A signal ends the pipeline.

    Args:
        recipe: The pipeline.
        steps: Its steps.
        request: How it is run.
        quiet: Whether no table is printed at the end.
    """
    failed: dict[str, int] = {}
    has_steps_file = False  # nothing is written until a step is complete
    for number, step in enumerate(steps, 1):
        if step.cell in failed:
            continue
        print_progress(f"[{number}/{len(steps)}] {step.title}")
        command = build_python_command("azrecipe", "run", *request.build_arguments(step.key, step.cell), "--quiet")
        if request.accelerate_config:
            command += ["--accelerate-config", request.accelerate_config]
        if request.num_processes:
            command += ["--num-processes", str(request.num_processes)]
        child = launch_command.run_child(command, "the process of this step")
        if child.exit_code != EXIT_SUCCESS:
            record_unreported_end(locate_run(step.recipe, request.runs_dir), child.exit_code, child.message, is_known=False)
        code = launch_command.get_stop_code() or child.exit_code
        if code == EXIT_SUCCESS:
            if not has_steps_file:
                _write_steps_file(recipe, steps, request)
                has_steps_file = True
            continue
        is_signal = code in (EXIT_SIGINT, EXIT_SIGTERM)
        advice = "the same command resumes there" if step.cell is None or is_signal else "the other cells continue"
        print_progress(f"azrecipe: {step.title} ended with exit code {code}; {advice}")
        if step.cell is None or is_signal:
            if not is_signal:
                write_page(locate_run(recipe, request.runs_dir).path)
            return code
        failed[step.cell] = code
    _show_results(recipe, steps, request, failed, quiet=quiet)
    for cell, code in failed.items():
        print_progress(f"azrecipe: cell {cell} failed with exit code {code}; the same command tries it again")
    return next(iter(failed.values()), EXIT_SUCCESS)


def _show_results(recipe: Recipe, steps: Sequence[PipelineStep], request: RunRequest, failed: Mapping[str, int], *, quiet: bool) -> None:
    """Print a pipeline's final tables, and write its page.

    They show the steps, or compare the cells, or show each cell's steps.
    """
    runs_dir, cells = request.runs_dir, group_by_cell(steps)
    if recipe.config.compare is not None:
        if request.cell:  # compare it with the other cells as they are
            cells = group_by_cell(load_pipeline(recipe.path, parse_overrides(request.overrides))[1])
        result = matrix_ranking.rank_cells(recipe, cells, runs_dir, failed)
        matrix_ranking.write_ranking(recipe, runs_dir, result)
        if not quiet:
            terminal_tables.show_comparison(result, recipe.data["description"] or recipe.name)
    elif not quiet:
        for recipes in cells.values() or [[step.recipe for step in steps]]:
            terminal_tables.show_pipeline(recipe, recipes, runs_dir)
    write_page(locate_run(recipe, runs_dir).path)


def check_order(recipe: Recipe, steps: Sequence[PipelineStep], runs_dir: Path) -> None:
    """Refuse a step whose upstream recipe has no finished run.

    An earlier step of the pipeline needs none. Nothing has been started.
    """
    problems = []
    earlier: set[Path] = set()
    for step in steps:
        for keys, output_of in find_upstream_references(step.recipe.data):
            run = locate_named_run(step.recipe, runs_dir, Path(output_of).stem)
            if run.path not in earlier and not run.is_complete:
                keys_of_steps = dict.fromkeys(s.key for s in steps)
                message = f"takes the output of {Path(output_of).name}, which is no earlier step of {recipe.path.name} and has no finished run. Steps: {list_choices(keys_of_steps)}"
                problems += step.recipe.error(message, *keys).problems
        problems += _find_missing_candidate(step.recipe, runs_dir, earlier)
        earlier.add(locate_run(step.recipe, runs_dir).path)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _find_missing_candidate(recipe: Recipe, runs_dir: Path, earlier: set[Path]) -> list[Problem]:
    """Find a `tokenizer.candidate` that a finished run lacks.

    Candidates of the pipeline's steps were checked when the recipes were read.
    """
    settings = recipe.config.tokenizer if recipe.stage == "pretrain" else None
    if settings is None or settings.candidate is None or settings.output_of is None:
        return []
    run = locate_named_run(recipe, runs_dir, Path(settings.output_of).stem)
    if run.path in earlier or not run.is_complete:
        return []
    try:
        find_candidate_folder(recipe, run, settings.candidate, "tokenizer", "candidate")
    except RecipeError as error:
        return error.problems
    return []


def check_run_dirs(steps: Sequence[PipelineStep], runs_dir: Path) -> None:
    """Refuse steps whose run directories hold runs of other recipes."""
    messages = []
    for step in steps:
        try:
            check_run_matches(step.recipe, locate_run(step.recipe, runs_dir))
        except CommandError as error:
            messages.append(str(error))
    if messages:
        raise CommandError("\n".join(messages))
