"""`azrecipe check` and `azrecipe prepare`: the work before a run."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from azrecipe.errors import EXIT_SUCCESS, CommandError, explain_error
from azrecipe.pipeline import preflight
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import find_upstream_references, open_recipe
from azrecipe.runs.run_dir import locate_named_run, locate_run
from azrecipe.runs.run_files import check_run_folder
from azrecipe.utils import shipped_files


def prepare_recipes(arguments: argparse.Namespace) -> int:
    """`azrecipe prepare`: tokenise a pretrain recipe's text into the cache.

    Of a pipeline, every pretrain recipe is prepared.
    """
    recipe, recipes = _open_recipes(arguments)
    recipes = [one for one in recipes if one.stage == "pretrain"]
    if not recipes:
        article = "an" if recipe.stage == "evaluate" else "a"
        raise CommandError(
            f"{recipe.path}: {article} {recipe.stage} recipe. azrecipe prepare takes pretrain recipes and pipelines with some"
        )
    preflight.check_local_files(recipes)

    for one in recipes:
        missing = _list_unfinished_upstream(one, arguments.runs_dir)
        if missing and len(recipes) > 1:
            print(f"{one.path.name}: not prepared: it takes from {', '.join(missing)}, which has no finished run yet", file=sys.stderr)
            continue
        try:
            _prepare_recipe(one, arguments.runs_dir)
        except (OSError, MemoryError) as error:
            raise explain_error(error) or error from None
    return EXIT_SUCCESS


def check_recipes(arguments: argparse.Namespace) -> int:
    """`azrecipe check`: refuse what a run would refuse, and preview its data."""
    recipe, recipes = _open_recipes(arguments)
    preflight.check_local_files(recipes)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warn about each other

    for one in [recipe, *recipes]:
        check_run_folder(locate_run(one, arguments.runs_dir).path)
    for one in recipes:
        missing = _list_unfinished_upstream(one, arguments.runs_dir)
        if missing and len(recipes) > 1:
            print(f"{one.path.name}: only its file was checked: it takes from {', '.join(missing)}, which has no finished run yet")
            continue
        try:
            _check_recipe(one, arguments.runs_dir)
        except (OSError, MemoryError) as error:
            raise explain_error(error) or error from None
    return EXIT_SUCCESS


def _open_recipes(arguments: argparse.Namespace) -> tuple[Recipe, list[Recipe]]:
    """Open the recipe of a command line.

    Also returns the recipes that its run would consist of.
    """
    path = shipped_files.resolve_shipped_path(arguments.recipe)
    recipe, steps = open_recipe(path, parse_overrides(arguments.set), arguments.step, arguments.cell)
    return recipe, [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]


def _prepare_recipe(recipe: Recipe, runs_dir: Path) -> None:
    from azrecipe.cli import prepare_tables  # both imports load torch
    from azrecipe.stages import pretrain

    preparation = pretrain.prepare(recipe, runs_dir)
    prepare_tables.show_preparation(recipe.path.name, preparation.text)  # first: the schedule may be refused, and this table says why
    prepare_tables.show_schedule(preparation.text, preparation.build_schedule())


def _check_recipe(recipe: Recipe, runs_dir: Path) -> None:
    from azrecipe.cli import check_preview
    from azrecipe.data.inputs import Inputs
    from azrecipe.stages import evaluate, pretrain, sft

    if recipe.stage == "sft":
        check_preview.show_sft_preview(recipe, sft.check(recipe, Inputs(recipe, runs_dir)))
    elif recipe.stage == "pretrain":
        check_preview.show_pretrain_preview(recipe, pretrain.check(recipe, runs_dir))
    elif recipe.stage == "evaluate":
        evaluate.check(recipe, Inputs(recipe, runs_dir))
    print(f"{recipe.path}: All checks passed.")


def _list_unfinished_upstream(recipe: Recipe, runs_dir: Path) -> list[str]:
    """List the upstream recipes that have no finished run."""
    names = dict.fromkeys(Path(output_of).name for _, output_of in find_upstream_references(recipe.data))
    return [name for name in names if not locate_named_run(recipe, runs_dir, Path(name).stem).is_complete]
