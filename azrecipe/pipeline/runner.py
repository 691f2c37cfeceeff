"""Recipes in order or as a matrix, each in processes of its own."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from azrecipe.errors import DONE, SIGINT, SIGTERM, CommandError, Problem, RecipeError, allowed
from azrecipe.pipeline import launch_command, matrix_ranking
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import Step, load_pipeline, of_cells, taken
from azrecipe.report import page, terminal_tables
from azrecipe.runs.reader import STEPS
from azrecipe.runs.run_dir import asked, candidate_of, check_same, locate, run_of
from azrecipe.utils.atomic_files import read_json, write_json


def _note(recipe: Recipe, steps: Sequence[Step], arguments: argparse.Namespace) -> bool:
    """Leave in the pipeline's own folder what was asked and where its steps' runs are, for its page. Returns True: it was tried."""
    place = locate(recipe, arguments.runs_dir)
    if arguments.cell:  # the page shows the others too
        steps = load_pipeline(recipe.path, parse_overrides(arguments.set))[1]
    runs = [os.path.relpath(locate(step.recipe, arguments.runs_dir).path, place.path.parent) for step in steps]
    listed = {"steps": [{"step": step.key, "cell": step.cell, "run": run} for step, run in zip(steps, runs, strict=True)]}
    with contextlib.suppress(OSError):  # where nothing can be written the steps say so
        if read_json(place.path / STEPS) != listed:
            write_json(place.path / STEPS, listed)  # first: it proves that the folder is ours
        asked(recipe, place)
    return True


def write_page(run: Path) -> None:
    """A page for people; that it cannot be made is no failure of a run that is complete. AZRECIPE_PAGE=0: none is wanted."""
    try:
        if os.environ.get("AZRECIPE_PAGE") != "0" and run.is_dir() and not page.fresh(run):
            page.write(run)
    except Exception as error:
        print(f"azrecipe: {run / 'report.html'} could not be made: {error!r}", file=sys.stderr, flush=True)


def worker_arguments(arguments: argparse.Namespace, step: str | None, cell: str | None) -> list[str]:
    line = [arguments.recipe, "--runs-dir", str(arguments.runs_dir)]
    for text in arguments.set:
        line += ["--set", text]
    line += ["--step", step] if step else []
    return [*line, "--cell", cell] if cell else line


def run_steps(recipe: Recipe, steps: Sequence[Step], arguments: argparse.Namespace) -> int:
    """Run the steps in order. What fails ends it all, or in a cell of a matrix that cell; a signal ends it all."""
    failed: dict[str, int] = {}
    noted = False  # a pipeline whose first step is refused leaves nothing
    for number, step in enumerate(steps, 1):
        if step.cell in failed:
            continue
        print(f"[{number}/{len(steps)}] {step.title}", file=sys.stderr, flush=True)
        line = [sys.executable, "-m", "azrecipe", "run", *worker_arguments(arguments, step.key, step.cell), "--quiet"]
        if arguments.accelerate_config:
            line += ["--accelerate-config", arguments.accelerate_config]
        if arguments.num_processes:
            line += ["--num-processes", str(arguments.num_processes)]
        code = launch_command.run_child(line)
        code = launch_command.stopped() or code
        if code == DONE:
            noted = noted or _note(recipe, steps, arguments)
            continue
        stops = step.cell is None or code in (SIGINT, SIGTERM)
        then = "the same command goes on from there" if stops else "the other cells go on"
        print(f"azrecipe: {step.title} ended with exit code {code}; {then}", file=sys.stderr, flush=True)
        if step.cell is None or stops:
            if code not in (SIGINT, SIGTERM):
                write_page(locate(recipe, arguments.runs_dir).path)
            return code
        failed[step.cell] = code
    _show(recipe, steps, arguments, failed)
    for cell, code in failed.items():
        print(f"azrecipe: cell {cell} failed with exit code {code}; the same command tries it again", file=sys.stderr, flush=True)
    return next(iter(failed.values()), DONE)


def _show(recipe: Recipe, steps: Sequence[Step], arguments: argparse.Namespace, failed: Mapping[str, int]) -> None:
    """The end of a pipeline: its table, the comparison of its cells, or each cell's own table."""
    runs_dir, cells = arguments.runs_dir, of_cells(steps)
    if recipe.config.compare is not None:
        if arguments.cell:  # the others are compared with it as they are
            cells = of_cells(load_pipeline(recipe.path, parse_overrides(arguments.set))[1])
        result = matrix_ranking.compare(recipe, cells, runs_dir, failed)
        matrix_ranking.write(recipe, runs_dir, result)
        if not arguments.quiet:
            terminal_tables.show_comparison(result, recipe.data["description"] or recipe.name)
    elif not arguments.quiet:
        for recipes in cells.values() or [[step.recipe for step in steps]]:
            terminal_tables.show_pipeline(recipe, recipes, runs_dir)
    write_page(locate(recipe, runs_dir).path)


def check_order(recipe: Recipe, steps: Sequence[Step], runs_dir: Path) -> None:
    """Refuse, before anything starts, a step that takes from a recipe which is no earlier step and has no finished run."""
    problems = []
    earlier: set[Path] = set()
    for step in steps:
        for keys, output_of in taken(step.recipe.data):
            run = run_of(step.recipe, runs_dir, Path(output_of).stem)
            if run.path not in earlier and not run.complete:
                known = dict.fromkeys(s.key for s in steps)
                message = f"takes the output of {Path(output_of).name}, which is no earlier step of {recipe.path.name} and has no finished run. Steps: {allowed(known)}"
                problems += step.recipe.problem(message, *keys).problems
        problems += _no_candidate(step.recipe, runs_dir, earlier)
        earlier.add(locate(step.recipe, runs_dir).path)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _no_candidate(recipe: Recipe, runs_dir: Path, earlier: set[Path]) -> list[Problem]:
    """What is wrong with a `tokenizer.candidate` of a run that no step makes; those of steps have been looked at with the recipes."""
    wanted = recipe.config.tokenizer if recipe.stage == "pretrain" else None
    if wanted is None or wanted.candidate is None or wanted.output_of is None:
        return []
    run = run_of(recipe, runs_dir, Path(wanted.output_of).stem)
    if run.path in earlier or not run.complete:
        return []
    try:
        candidate_of(recipe, run, wanted.candidate, "tokenizer", "candidate")
    except RecipeError as error:
        return error.problems
    return []


def check_runs(steps: Sequence[Step], runs_dir: Path) -> None:
    """Refuse, before anything starts, steps whose run directories hold the runs of other recipes."""
    found = []
    for step in steps:
        try:
            check_same(step.recipe, locate(step.recipe, runs_dir))
        except CommandError as error:
            found.append(str(error))
    if found:
        raise CommandError("\n".join(found))
