"""`azrecipe run`, and one process of a launched run."""

from __future__ import annotations

import argparse
import os

from azrecipe.errors import EXIT_SUCCESS
from azrecipe.operations import run
from azrecipe.operations.selection import select_recipes
from azrecipe.pipeline import worker
from azrecipe.pipeline.runner import write_page
from azrecipe.report import terminal_tables
from azrecipe.runs.run_dir import locate_run


def run_recipe(arguments: argparse.Namespace) -> int:
    """`azrecipe run`: run a recipe or a pipeline; return the exit code."""
    report = run.run_recipe(
        arguments.recipe,
        overrides=arguments.set,
        runs_dir=arguments.runs_dir,
        step=arguments.step,
        cell=arguments.cell,
        accelerate_config=arguments.accelerate_config,
        num_processes=arguments.num_processes,
        quiet=arguments.quiet,
    )
    if report.exit_code == EXIT_SUCCESS and report.recipe.stage != "pipeline" and not arguments.quiet:
        terminal_tables.show_run(report.recipe, arguments.runs_dir)
    return report.exit_code


def run_worker_process(arguments: argparse.Namespace) -> int:
    """Run one process of a launched run; return the exit code.

    The main process writes the run's page at the end.
    """
    result = worker.run_worker(arguments.recipe, arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    if result.exit_code == EXIT_SUCCESS and os.environ.get("RANK", "0") == "0":
        selection = select_recipes(arguments.recipe, overrides=arguments.set, step=arguments.step, cell=arguments.cell)
        write_page(locate_run(selection.recipe, arguments.runs_dir).path)
    return result.exit_code
