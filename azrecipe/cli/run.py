"""`azrecipe run`, and one process of a launched run."""

from __future__ import annotations

import argparse
import os

from azrecipe.errors import DONE
from azrecipe.pipeline import launch_command, preflight, worker
from azrecipe.pipeline.runner import check_order, check_runs, run_steps, worker_arguments, write_page
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe
from azrecipe.report import terminal_tables
from azrecipe.runs.run_dir import locate
from azrecipe.runs.run_files import check_folder
from azrecipe.utils import shipped_files


def run(arguments: argparse.Namespace) -> int:
    """`azrecipe run`: one recipe, launched as asked, or every step of a pipeline. Returns the exit code."""
    path = shipped_files.find(arguments.recipe)
    recipe, steps = open_recipe(path, parse_overrides(arguments.set), arguments.step, arguments.cell)
    launch = preflight.read(
        launch_command.config_file(arguments.accelerate_config) if arguments.accelerate_config else None, arguments.num_processes
    )
    if recipe.stage == "pipeline":
        check_order(recipe, steps, arguments.runs_dir)
        preflight.check([s.recipe for s in steps if not locate(s.recipe, arguments.runs_dir).complete], launch)
        check_folder(locate(recipe, arguments.runs_dir).path)
        check_runs(steps, arguments.runs_dir)
        return run_steps(recipe, steps, arguments)
    line = None
    if recipe.stage in preflight.TRAINING:
        line = launch_command.launched(
            worker_arguments(arguments, arguments.step, arguments.cell), arguments.accelerate_config, arguments.num_processes
        )
    if line is not None:
        preflight.check([recipe], launch)
    if line is None:
        code = worker.start(str(path), arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    else:
        code = launch_command.run_child(line)
    if code == DONE:
        write_page(locate(recipe, arguments.runs_dir).path)
        if not arguments.quiet:
            terminal_tables.show_run(recipe, arguments.runs_dir)
    return code


def work(arguments: argparse.Namespace) -> int:
    """One process of a launched run; the main one makes the run's page at its end. Returns the exit code."""
    code = worker.start(arguments.recipe, arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    if code == DONE and os.environ.get("RANK", "0") == "0":
        recipe, _ = open_recipe(shipped_files.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)
        write_page(locate(recipe, arguments.runs_dir).path)
    return code
