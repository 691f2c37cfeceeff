"""`azrecipe run`, and one process of a launched run."""

from __future__ import annotations

import argparse
import os

from azrecipe.errors import EXIT_SUCCESS
from azrecipe.pipeline import launch_command, preflight, worker
from azrecipe.pipeline.runner import build_worker_arguments, check_order, check_run_dirs, run_steps, write_page
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe
from azrecipe.report import terminal_tables
from azrecipe.runs.run_dir import locate_run
from azrecipe.runs.run_files import check_run_folder
from azrecipe.utils import shipped_files


def run_recipe(arguments: argparse.Namespace) -> int:
    """`azrecipe run`: run a recipe or a pipeline; return the exit code."""
    path = shipped_files.resolve_shipped_path(arguments.recipe)
    recipe, steps = open_recipe(path, parse_overrides(arguments.set), arguments.step, arguments.cell)
    launch = preflight.read_launch_config(
        launch_command.resolve_accelerate_config(arguments.accelerate_config) if arguments.accelerate_config else None,
        arguments.num_processes,
    )
    if recipe.stage == "pipeline":
        check_order(recipe, steps, arguments.runs_dir)
        preflight.check_launch([step.recipe for step in steps if not locate_run(step.recipe, arguments.runs_dir).is_complete], launch)
        check_run_folder(locate_run(recipe, arguments.runs_dir).path)
        check_run_dirs(steps, arguments.runs_dir)
        return run_steps(recipe, steps, arguments)
    command = None
    if recipe.stage in preflight.TRAINING_STAGES:
        command = launch_command.build_launch_command(
            build_worker_arguments(arguments, arguments.step, arguments.cell), arguments.accelerate_config, arguments.num_processes
        )
    if command is None:
        code = worker.run_worker(str(path), arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    else:
        preflight.check_launch([recipe], launch)
        code = launch_command.run_child(command)
    if code == EXIT_SUCCESS:
        write_page(locate_run(recipe, arguments.runs_dir).path)
        if not arguments.quiet:
            terminal_tables.show_run(recipe, arguments.runs_dir)
    return code


def run_worker_process(arguments: argparse.Namespace) -> int:
    """Run one process of a launched run; return the exit code.

    The main process writes the run's page at the end.
    """
    code = worker.run_worker(arguments.recipe, arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    if code == EXIT_SUCCESS and os.environ.get("RANK", "0") == "0":
        recipe, _ = open_recipe(
            shipped_files.resolve_shipped_path(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell
        )
        write_page(locate_run(recipe, arguments.runs_dir).path)
    return code
