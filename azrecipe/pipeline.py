"""Recipes in order, each in processes of its own; and `azrecipe run`, which is a pipeline of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from azrecipe.errors import DONE, RecipeError, allowed
from azrecipe.launch import command, preflight, worker
from azrecipe.parts.run_dir import RunDir, locate
from azrecipe.recipe import resources
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.steps import Step, open_recipe
from azrecipe.report import tables


def run(arguments: argparse.Namespace) -> int:
    """`azrecipe run`: one recipe, launched as asked, or every step of a pipeline. Returns the exit code."""
    path = resources.find(arguments.recipe)
    recipe, steps = open_recipe(path, parse_overrides(arguments.set), arguments.step)
    launch = preflight.read(
        command.config_file(arguments.accelerate_config) if arguments.accelerate_config else None, arguments.num_processes
    )
    if recipe.stage == "pipeline":
        _check_order(recipe, steps, arguments.runs_dir)
        preflight.check([s.recipe for s in steps if not locate(s.recipe, arguments.runs_dir).complete], launch)
        return _all(recipe, steps, arguments)
    line = None
    if recipe.stage in preflight.TRAINING:
        line = command.launched(_worker_arguments(arguments), arguments.accelerate_config, arguments.num_processes)
    if line is not None:
        preflight.check([recipe], launch)
    if line is None:
        code = worker.start(str(path), arguments.set, arguments.runs_dir, arguments.step)
    else:
        code = command.run_child(line)
    if code == DONE and not arguments.quiet:
        tables.show_run(recipe, arguments.runs_dir)
    return code


def _worker_arguments(arguments: argparse.Namespace) -> list[str]:
    line = [arguments.recipe, "--runs-dir", str(arguments.runs_dir)]
    for text in arguments.set:
        line += ["--set", text]
    return [*line, "--step", arguments.step] if arguments.step else line


def _all(recipe: Recipe, steps: Sequence[Step], arguments: argparse.Namespace) -> int:
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.key}", file=sys.stderr, flush=True)
        line = [sys.executable, "-m", "azrecipe", "run", *_worker_arguments(arguments), "--step", step.key, "--quiet"]
        if arguments.accelerate_config:
            line += ["--accelerate-config", arguments.accelerate_config]
        if arguments.num_processes:
            line += ["--num-processes", str(arguments.num_processes)]
        code = command.run_child(line)
        if code != DONE:
            print(f"azrecipe: {step.key} ended with exit code {code}; the same command goes on from there", file=sys.stderr)
            return code
    tables.show_pipeline(recipe, [step.recipe for step in steps], arguments.runs_dir)
    return DONE


def _check_order(recipe: Recipe, steps: Sequence[Step], runs_dir: Path) -> None:
    """Refuse, before anything starts, a step that takes from a recipe which is no earlier step and has no finished run."""
    problems = []
    earlier: set[str] = set()
    for step in steps:
        for keys, output_of in _taken(step.recipe.data):
            name = Path(output_of).stem
            if name not in earlier and not RunDir(runs_dir / recipe.project / name, main=False).complete:
                message = f"takes the output of {Path(output_of).name}, which is no earlier step of {recipe.path.name} and has no finished run. Steps: {allowed(s.key for s in steps)}"
                problems += step.recipe.problem(message, *keys).problems
        earlier.add(step.recipe.name)
    if problems:
        raise RecipeError(problems)


def _taken(data: object, keys: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], str]]:
    """Every `output_of` and `continue_from` in a resolved recipe, with its path of keys."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("output_of", "continue_from") and isinstance(value, str):
                found.append(((*keys, key), value))
            else:
                found += _taken(value, (*keys, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            found += _taken(value, (*keys, i))
    return found
