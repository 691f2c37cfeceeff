"""`azrecipe check` and `azrecipe prepare`: what is done before a run."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from types import ModuleType

from azrecipe.errors import DONE, CommandError, explain
from azrecipe.pipeline import preflight
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe, taken
from azrecipe.runs.run_dir import locate, run_of
from azrecipe.runs.run_files import check_folder
from azrecipe.utils import shipped_files


def prepare(arguments: argparse.Namespace) -> int:
    """`azrecipe prepare`: what the run of a pretrain recipe, or of each in a pipeline, reads is put into the cache, and shown."""
    recipe, steps = open_recipe(shipped_files.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)
    chosen = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    chosen = [one for one in chosen if one.stage == "pretrain"]
    if not chosen:
        article = "an" if recipe.stage == "evaluate" else "a"
        raise CommandError(
            f"{recipe.path}: {article} {recipe.stage} recipe; what can be prepared is pretrain recipes and pipelines with some"
        )
    preflight.check_data(chosen)

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
    from azrecipe.cli import prepare_tables  # both load what a run loads
    from azrecipe.stages import pretrain

    made, lay = pretrain.prepare(recipe, runs_dir)
    prepare_tables.show(recipe.path.name, made)  # before what may be refused: it says why a source is read too often
    prepare_tables.show_schedule(made, lay())


def check(arguments: argparse.Namespace) -> int:
    """`azrecipe check`: all that a run refuses before it starts, and what the model will be shown."""
    recipe, steps = open_recipe(shipped_files.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)
    chosen = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    preflight.check_data(chosen)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' among themselves
    from azrecipe.cli import check_preview

    for one in [recipe, *chosen]:
        check_folder(locate(one, arguments.runs_dir).path)
    for one in chosen:
        missing = _unfinished(one, arguments.runs_dir)
        if missing and len(chosen) > 1:
            print(f"{one.path.name}: not checked beyond its file: it takes from {', '.join(missing)}, which has no finished run yet")
            continue
        try:
            _check(one, arguments.runs_dir, check_preview)
        except (OSError, MemoryError) as error:
            raise explain(error) or error from None
    return DONE


def _check(recipe: Recipe, runs_dir: Path, preview: ModuleType) -> None:
    from azrecipe.data.inputs import Inputs
    from azrecipe.stages import evaluate, pretrain, sft

    if recipe.stage == "sft":
        preview.show_tuning(recipe, sft.check(recipe, Inputs(recipe, runs_dir)))
    elif recipe.stage == "pretrain":
        preview.show_phases(recipe, *pretrain.check(recipe, runs_dir))
    elif recipe.stage == "evaluate":
        evaluate.check(recipe, Inputs(recipe, runs_dir))
    print(f"{recipe.path}: nothing that can be told beforehand stands in the way")


def _unfinished(recipe: Recipe, runs_dir: Path) -> list[str]:
    """The recipes that one takes from and that have no finished run."""
    names = dict.fromkeys(Path(output_of).name for _, output_of in taken(recipe.data))
    return [name for name in names if not run_of(recipe, runs_dir, Path(name).stem).complete]
