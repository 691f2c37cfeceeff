"""`azrecipe check` and `azrecipe prepare`: the work before a run."""

from __future__ import annotations

import argparse

from azrecipe.cli import check_preview, prepare_tables
from azrecipe.errors import EXIT_SUCCESS
from azrecipe.operations import check, prepare
from azrecipe.operations.check import RecipeCheck
from azrecipe.operations.check_preview import PretrainPreview, SftPreview
from azrecipe.operations.prepare import RecipePreparation
from azrecipe.utils.console import print_line, print_progress


def prepare_recipes(arguments: argparse.Namespace) -> int:
    """`azrecipe prepare`: tokenise a pretrain recipe's text into the cache.

    Of a pipeline, every pretrain recipe is prepared.
    """
    prepare.prepare_recipes(
        arguments.recipe,
        overrides=arguments.set,
        runs_dir=arguments.runs_dir,
        step=arguments.step,
        cell=arguments.cell,
        on_progress=_show_preparation,
    )
    return EXIT_SUCCESS


def _show_preparation(preparation: RecipePreparation) -> None:
    if preparation.missing_runs:
        names = ", ".join(preparation.missing_runs)
        print_progress(f"{preparation.path.name}: not prepared: it takes from {names}, which has no finished run yet")
    elif preparation.schedule is None:  # first: the schedule may be refused, and this table says why
        prepare_tables.show_sources(preparation)
    else:
        prepare_tables.show_schedule(preparation, preparation.schedule)


def check_recipes(arguments: argparse.Namespace) -> int:
    """`azrecipe check`: refuse what a run would refuse, and preview its data."""
    check.check_recipes(
        arguments.recipe,
        overrides=arguments.set,
        runs_dir=arguments.runs_dir,
        step=arguments.step,
        cell=arguments.cell,
        on_check=_show_check,
    )
    return EXIT_SUCCESS


def _show_check(recipe: RecipeCheck) -> None:
    if recipe.missing_runs:
        names = ", ".join(recipe.missing_runs)
        print_line(
            f"{recipe.path.name}: checked as far as it can be before {names} has run: not what depends on that run's tokens and weights"
        )
        return
    if isinstance(recipe.preview, SftPreview):
        check_preview.show_sft_preview(recipe.path, recipe.preview)
    elif isinstance(recipe.preview, PretrainPreview):
        check_preview.show_pretrain_preview(recipe.path, recipe.preview)
    print_line(f"{recipe.path}: All checks passed.")
