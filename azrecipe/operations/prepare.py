"""Prepare pretrain recipes: fill the cache of tokenised text before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError, explain_error
from azrecipe.operations.selection import list_unfinished_upstream, select_recipes
from azrecipe.pipeline import preflight
from azrecipe.recipe.load import Recipe

if TYPE_CHECKING:
    from azrecipe.data.phase_schedule import PhaseSchedule
    from azrecipe.data.preparation import PreparedText


@dataclass(frozen=True)
class SourceSummary:
    """A tokenised source.

    Attributes:
        title: The source, as a table shows it.
        num_documents: Documents that are trained on.
        num_bytes: Their bytes.
        num_tokens: Their tokens.
        dropped: Documents that were left out, by reason.
        length_percentiles: Tokens in a document, by percentile.
        fitting_shares: The share of documents that fit a length, by that length in tokens.
    """

    title: str
    num_documents: int
    num_bytes: int
    num_tokens: int
    dropped: Mapping[str, int]
    length_percentiles: Mapping[int, int]
    fitting_shares: Mapping[int, float]


@dataclass(frozen=True)
class PhaseSummary:
    """What a phase reads.

    Attributes:
        name: The phase.
        steps: Its optimizer steps.
        sequences: Its sequences.
        tokens: Its tokens.
        fill: The share of positions that hold tokens.
        shares: The share of each source, in order; empty where no phase has a mix of its own.
    """

    name: str
    steps: int
    sequences: int
    tokens: int
    fill: float
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class ScheduleSummary:
    """What the phases read, and the epochs of each source in order."""

    phases: tuple[PhaseSummary, ...]
    epochs: tuple[float, ...]


@dataclass(frozen=True)
class RecipePreparation:
    """What is in the cache for one recipe.

    Attributes:
        path: The recipe.
        missing_runs: Recipes of a pipeline that this one takes from and that have no finished run. With one, nothing was prepared.
        max_length: Tokens in a sequence.
        sources: The tokenised sources.
        schedule: What the phases read; None where nothing was prepared, and while the schedule is not known yet.
    """

    path: Path
    missing_runs: tuple[str, ...] = ()
    max_length: int = 0
    sources: tuple[SourceSummary, ...] = ()
    schedule: ScheduleSummary | None = None


@dataclass(frozen=True)
class PrepareReport:
    """The preparations of a recipe, or of each pretrain recipe of a pipeline."""

    recipes: tuple[RecipePreparation, ...]


def prepare_recipes(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    step: str | None = None,
    cell: str | None = None,
    on_progress: Callable[[RecipePreparation], None] | None = None,
) -> PrepareReport:
    """Tokenise the text of a pretrain recipe, or of those of a pipeline.

    Args:
        recipe: The path of a pretrain recipe or pipeline.
        overrides: KEY=VALUE, as `--set` takes them.
        runs_dir: The folder of run directories, which has the cache.
        step: The only step of a pipeline to prepare.
        cell: The only cell of a matrix to prepare.
        on_progress: Called when a recipe's text is there, and again when its schedule is: the schedule may be refused.

    Returns:
        What is in the cache now.

    Raises:
        RecipeError: A recipe is wrong, or its text is not enough for its phases.
        CommandError: There is no such step or cell, or no pretrain recipe.
        CannotRun: This machine lacks memory, disk space or a network.
    """
    selection = select_recipes(recipe, overrides=overrides, step=step, cell=cell)
    recipes = [one for one in selection.recipes if one.stage == "pretrain"]
    if not recipes:
        stage = selection.recipe.stage
        article = "an" if stage == "evaluate" else "a"
        raise CommandError(
            f"{selection.recipe.path}: {article} {stage} recipe. azrecipe prepare takes pretrain recipes and pipelines with some"
        )
    preflight.check_local_files(recipes)
    notify = on_progress or (lambda _: None)
    preparations = []
    for one in recipes:
        missing_runs = list_unfinished_upstream(one, runs_dir) if len(recipes) > 1 else ()
        if missing_runs:
            preparation = RecipePreparation(one.path, missing_runs)
            notify(preparation)
        else:
            try:
                preparation = _prepare_recipe(one, runs_dir, notify)
            except (OSError, MemoryError) as error:
                raise explain_error(error) or error from None
        preparations.append(preparation)
    return PrepareReport(tuple(preparations))


def _prepare_recipe(recipe: Recipe, runs_dir: Path, notify: Callable[[RecipePreparation], None]) -> RecipePreparation:
    from azrecipe.stages import pretrain  # loads torch

    filled = pretrain.prepare(recipe, runs_dir)
    preparation = RecipePreparation(recipe.path, (), filled.text.max_length, summarize_sources(filled.text))
    notify(preparation)
    preparation = replace(preparation, schedule=summarize_schedule(filled.build_schedule()))
    notify(preparation)
    return preparation


def summarize_sources(text: PreparedText) -> tuple[SourceSummary, ...]:
    """Summarise the size of each source, and the lengths of its documents."""
    from azrecipe.data.preparation import count_dropped

    return tuple(
        SourceSummary(
            source.title,
            store.num_documents,
            store.num_bytes,
            store.num_tokens,
            count_dropped(store),
            text.compute_percentiles(i),
            text.compute_fitting_shares(i),
        )
        for i, (source, store) in enumerate(zip(text.sources, text.stores, strict=True))
    )


def summarize_schedule(schedule: PhaseSchedule) -> ScheduleSummary:
    """Summarise what the phases read."""
    phases = []
    for i, phase in enumerate(schedule.phases):
        sequences = phase.steps * schedule.global_batch_size
        tokens = schedule.build_dataset(i).count_tokens(sequences)
        shares = tuple(schedule.phase_shares.get(phase.name, ()))
        phases.append(PhaseSummary(phase.name, phase.steps, sequences, tokens, float(schedule.measure_fill(i)), shares))
    return ScheduleSummary(tuple(phases), tuple(schedule.source_epochs))
