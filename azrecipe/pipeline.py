"""Recipes in order or as a matrix, each in processes of its own; and `azrecipe run`, which is a pipeline of one."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from azrecipe.errors import DONE, SIGINT, SIGTERM, CommandError, Problem, RecipeError, allowed
from azrecipe.launch import command, preflight, worker
from azrecipe.parts.backend import Mesh
from azrecipe.parts.files import read_json, write_json
from azrecipe.parts.run_dir import asked, candidate_of, check_same, locate, run_of
from azrecipe.parts.run_files import check_folder
from azrecipe.plan.where import NOWHERE, Where, kind_of
from azrecipe.recipe import resources
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.steps import Step, load_pipeline, of_cells, open_recipe, taken
from azrecipe.report import comparison, page, tables
from azrecipe.report.runs import STEPS


def run(arguments: argparse.Namespace) -> int:
    """`azrecipe run`: one recipe, launched as asked, or every step of a pipeline. Returns the exit code."""
    path = resources.find(arguments.recipe)
    recipe, steps = open_recipe(path, parse_overrides(arguments.set), arguments.step, arguments.cell)
    launch = preflight.read(
        command.config_file(arguments.accelerate_config) if arguments.accelerate_config else None, arguments.num_processes
    )
    if recipe.stage == "pipeline":
        _check_order(recipe, steps, arguments.runs_dir)
        preflight.check([s.recipe for s in steps if not locate(s.recipe, arguments.runs_dir).complete], launch)
        check_folder(locate(recipe, arguments.runs_dir).path)
        _check_runs(steps, arguments.runs_dir)
        return _all(recipe, steps, arguments)
    line = None
    if recipe.stage in preflight.TRAINING:
        line = command.launched(
            _worker_arguments(arguments, arguments.step, arguments.cell), arguments.accelerate_config, arguments.num_processes
        )
    if line is not None:
        preflight.check([recipe], launch)
    if line is None:
        code = worker.start(str(path), arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    else:
        code = command.run_child(line)
    if code == DONE:
        _page(locate(recipe, arguments.runs_dir).path)
        if not arguments.quiet:
            tables.show_run(recipe, arguments.runs_dir)
    return code


def prepare(arguments: argparse.Namespace) -> int:
    """`azrecipe prepare`: what the run of a pretrain recipe, or of each in a pipeline, reads is put into the cache, and shown."""
    recipe, steps = open_recipe(resources.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)
    chosen = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    chosen = [one for one in chosen if one.stage == "pretrain"]
    if not chosen:
        article = "an" if recipe.stage == "evaluate" else "a"
        raise CommandError(
            f"{recipe.path}: {article} {recipe.stage} recipe; what can be prepared is pretrain recipes and pipelines with some"
        )
    preflight.check_data(chosen)
    from azrecipe.parts.failures import explain

    for one in chosen:
        missing = _unfinished(one, arguments.runs_dir)
        if missing and len(chosen) > 1:
            print(f"{one.path.name}: not prepared: it takes from {', '.join(missing)}, which has no finished run yet", file=sys.stderr)
            continue
        try:
            _prepare(one, arguments.runs_dir)
        except (OSError, MemoryError) as error:
            raise explain(error) or error from None
    return DONE


def _prepare(recipe: Recipe, runs_dir: Path) -> None:
    from azrecipe.report import preparation  # both load what a run loads
    from azrecipe.stages import pretrain

    made, lay = pretrain.prepare(recipe, runs_dir)
    preparation.show(recipe.path.name, made)  # before what may be refused: it says why a source is read too often
    preparation.show_schedule(made, lay())


def check(arguments: argparse.Namespace) -> int:
    """`azrecipe check`: all that a run refuses before it starts, and what the model will be shown."""
    recipe, steps = open_recipe(resources.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)
    chosen = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    preflight.check_data(chosen)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' among themselves
    from azrecipe.parts.failures import explain
    from azrecipe.report import preview

    for one in [recipe, *chosen]:
        check_folder(locate(one, arguments.runs_dir).path)
    for one in chosen:
        missing = _unfinished(one, arguments.runs_dir)
        if missing and len(chosen) > 1:
            print(f"{one.path.name}: not checked beyond its file: it takes from {', '.join(missing)}, which has no finished run yet")
            continue
        try:
            _check(one, arguments.runs_dir, preview)
        except (OSError, MemoryError) as error:
            raise explain(error) or error from None
    return DONE


def _check(recipe: Recipe, runs_dir: Path, preview: ModuleType) -> None:
    from azrecipe.parts.sources import Inputs
    from azrecipe.stages import evaluate, pretrain, sft

    if recipe.stage == "sft":
        preview.show_tuning(recipe, sft.check(recipe, Inputs(recipe, runs_dir)))
    elif recipe.stage == "pretrain":
        preview.show_phases(recipe, *pretrain.check(recipe, runs_dir))
    elif recipe.stage == "evaluate":
        evaluate.check(recipe, Inputs(recipe, runs_dir))
    print(f"{recipe.path}: nothing that can be told beforehand stands in the way")


def plan(arguments: argparse.Namespace) -> int:
    """`azrecipe plan`: what a recipe, or each training step of a pipeline, would need on machines that are only named."""
    from azrecipe.plan import plan as planning

    if arguments.calibrate is not None:
        return planning.learn(arguments.calibrate)
    if arguments.recipe is None:
        raise CommandError("which recipe? azrecipe plan RECIPE --hardware NAME")
    path, overrides = resources.find(arguments.recipe), parse_overrides(arguments.set)
    recipe, steps = open_recipe(path, overrides, arguments.step, arguments.cell)
    chosen = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    beside = [step.recipe for step in load_pipeline(path, overrides)[1]] if arguments.step else chosen
    return planning.run(arguments, chosen, beside, _launch(arguments.accelerate_config))


def _launch(name: str | None) -> Where | None:
    """What an accelerate config says of any number of processes."""
    if name is None:
        return None
    asked = preflight.read(command.config_file(name), None)
    mesh = asked.mesh or Mesh()
    kind = kind_of(asked.kind, mesh.replicate, asked.zero_stage)
    return Where(NOWHERE, 1, kind, mesh.replicate, mesh.context, asked.reshard)


def _unfinished(recipe: Recipe, runs_dir: Path) -> list[str]:
    """The recipes that one takes from and that have no finished run."""
    names = dict.fromkeys(Path(output_of).name for _, output_of in taken(recipe.data))
    return [name for name in names if not run_of(recipe, runs_dir, Path(name).stem).complete]


def work(arguments: argparse.Namespace) -> int:
    """One process of a launched run; the main one makes the run's page at its end. Returns the exit code."""
    code = worker.start(arguments.recipe, arguments.set, arguments.runs_dir, arguments.step, arguments.cell)
    if code == DONE and os.environ.get("RANK", "0") == "0":
        recipe, _ = open_recipe(resources.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)
        _page(locate(recipe, arguments.runs_dir).path)
    return code


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


def _page(run: Path) -> None:
    """A page for people; that it cannot be made is no failure of a run that is complete. AZRECIPE_PAGE=0: none is wanted."""
    try:
        if os.environ.get("AZRECIPE_PAGE") != "0" and run.is_dir() and not page.fresh(run):
            page.write(run)
    except Exception as error:
        print(f"azrecipe: {run / 'report.html'} could not be made: {error!r}", file=sys.stderr, flush=True)


def _worker_arguments(arguments: argparse.Namespace, step: str | None, cell: str | None) -> list[str]:
    line = [arguments.recipe, "--runs-dir", str(arguments.runs_dir)]
    for text in arguments.set:
        line += ["--set", text]
    line += ["--step", step] if step else []
    return [*line, "--cell", cell] if cell else line


def _all(recipe: Recipe, steps: Sequence[Step], arguments: argparse.Namespace) -> int:
    """Run the steps in order. What fails ends it all, or in a cell of a matrix that cell; a signal ends it all."""
    failed: dict[str, int] = {}
    noted = False  # a pipeline whose first step is refused leaves nothing
    for number, step in enumerate(steps, 1):
        if step.cell in failed:
            continue
        print(f"[{number}/{len(steps)}] {step.title}", file=sys.stderr, flush=True)
        line = [sys.executable, "-m", "azrecipe", "run", *_worker_arguments(arguments, step.key, step.cell), "--quiet"]
        if arguments.accelerate_config:
            line += ["--accelerate-config", arguments.accelerate_config]
        if arguments.num_processes:
            line += ["--num-processes", str(arguments.num_processes)]
        code = command.run_child(line)
        code = command.stopped() or code
        if code == DONE:
            noted = noted or _note(recipe, steps, arguments)
            continue
        stops = step.cell is None or code in (SIGINT, SIGTERM)
        then = "the same command goes on from there" if stops else "the other cells go on"
        print(f"azrecipe: {step.title} ended with exit code {code}; {then}", file=sys.stderr, flush=True)
        if step.cell is None or stops:
            if code not in (SIGINT, SIGTERM):
                _page(locate(recipe, arguments.runs_dir).path)
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
        result = comparison.compare(recipe, cells, runs_dir, failed)
        comparison.write(recipe, runs_dir, result)
        if not arguments.quiet:
            tables.show_comparison(result, recipe.data["description"] or recipe.name)
    elif not arguments.quiet:
        for recipes in cells.values() or [[step.recipe for step in steps]]:
            tables.show_pipeline(recipe, recipes, runs_dir)
    _page(locate(recipe, runs_dir).path)


def _check_order(recipe: Recipe, steps: Sequence[Step], runs_dir: Path) -> None:
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


def _check_runs(steps: Sequence[Step], runs_dir: Path) -> None:
    """Refuse, before anything starts, steps whose run directories hold the runs of other recipes."""
    found = []
    for step in steps:
        try:
            check_same(step.recipe, locate(step.recipe, runs_dir))
        except CommandError as error:
            found.append(str(error))
    if found:
        raise CommandError("\n".join(found))
