"""azrecipe in Python: the verbs of the command line as functions.

`import azrecipe` offers them: azrecipe.load_recipe, check, plan, run, submit and read_run. What needs torch runs in a process of its own, so
that a notebook stays light and its GPU free. Problems raise the classes of azrecipe.errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.errors import CommandError
from azrecipe.operations.check import CheckReport, check_recipes
from azrecipe.operations.isolation import run_isolated, run_isolated_silently
from azrecipe.operations.plan import PlanReport, plan_recipes
from azrecipe.operations.python_terms import speak_python
from azrecipe.operations.run import run_recipe
from azrecipe.operations.selection import select_recipes
from azrecipe.recipe.load import Recipe
from azrecipe.runs import reader
from azrecipe.runs.reader import RunRecord

if TYPE_CHECKING:
    from azrecipe.sagemaker.jobs import TrainingJob

Overrides = Mapping[str, Any] | Sequence[str]


@speak_python
def load_recipe(recipe: str | Path, *, overrides: Overrides = (), step: str | None = None, cell: str | None = None) -> Recipe:
    """Load and check a recipe's file, as `azrecipe show` does.

    Args:
        recipe: The path of a recipe or pipeline, also of one that comes with azrecipe.
        overrides: Values by key path ({"training.learning_rate": 1e-4}), or texts as `--set` takes them. Of a pipeline, a key may begin
            with its step: "sft.yaml:lora.r".
        step: The step of a pipeline to load.
        cell: The cell of a matrix to load that step for.

    Returns:
        The recipe: `.data` is the resolved YAML, `.config` the same as a typed dataclass.

    Raises:
        RecipeError: The recipe is wrong; the error has every problem with its line and column.
        CommandError: There is no such step or cell.
    """
    return select_recipes(recipe, overrides=_format_overrides(overrides), step=step, cell=cell).recipe


@speak_python
def check(
    recipe: str | Path,
    *,
    overrides: Overrides = (),
    runs_dir: str | Path = "runs",
    step: str | None = None,
    cell: str | None = None,
) -> CheckReport:
    """Refuse what a run would refuse, and preview what it trains on.

    Needs no GPU and no weights.

    Args:
        recipe: The path of a recipe or pipeline.
        overrides: As for load_recipe.
        runs_dir: The folder of run directories.
        step: The only step of a pipeline to check.
        cell: The only cell of a matrix to check.

    Returns:
        One check for each recipe: whether all of it was checked or its file only, and a preview of its data.

    Raises:
        RecipeError: A recipe is wrong, or its data cannot be trained on.
        CommandError: There is no such step or cell, or a run directory holds other files.
        CannotRun: This machine lacks a package, memory, disk space or a network.
    """
    return run_isolated_silently(
        check_recipes, recipe=recipe, overrides=_format_overrides(overrides), runs_dir=Path(runs_dir), step=step, cell=cell
    )


@speak_python
def plan(
    recipe: str | Path,
    hardware: str | Sequence[str],
    *,
    nodes: int = 1,
    overrides: Overrides = (),
    runs_dir: str | Path = "runs",
    step: str | None = None,
    cell: str | None = None,
    accelerate_config: str | None = None,
    config_json: str | Path | None = None,
    vocab_size: int | None = None,
    hardware_file: str | Path | None = None,
    price_per_hour: float | None = None,
    with_alternatives: bool = True,
) -> PlanReport:
    """Estimate memory, time and price on machines that are only named.

    Needs no GPU, no weights and no data.

    Args:
        recipe: The path of a pretrain or sft recipe, or of a pipeline.
        hardware: A machine or cards by name (p5.48xlarge, "h100-80g x8"), or several to compare.
        nodes: How many of each machine.
        overrides: As for load_recipe.
        runs_dir: The folder of run directories, where models of finished runs are looked for.
        step: The only step of a pipeline to plan.
        cell: The only cell of a matrix to plan.
        accelerate_config: A file in accelerate_configs/ by name, or a path. None: FSDP, or one process.
        config_json: The base model's config.json, where the hub cannot be reached.
        vocab_size: The size of the vocabulary, whatever the recipe's tokenizer will have.
        hardware_file: A file with further machines, cards and prices.
        price_per_hour: USD for one machine, instead of the list price.
        with_alternatives: Whether single changes are estimated too, for one recipe on one machine.

    Returns:
        The estimates of each recipe on each machine. `.fits` says whether all of it fits, and `.problems` what does not.

    Raises:
        RecipeError: A recipe is wrong.
        CommandError: A machine is not known, the recipe trains nothing, or its only recipe cannot be estimated.
        CannotRun: The hub is needed and cannot be reached.
    """
    return run_isolated_silently(
        plan_recipes,
        recipe=recipe,
        hardware=(hardware,) if isinstance(hardware, str) else tuple(hardware),
        nodes=nodes,
        overrides=_format_overrides(overrides),
        runs_dir=Path(runs_dir),
        step=step,
        cell=cell,
        accelerate_config=accelerate_config,
        config_json=Path(config_json) if config_json is not None else None,
        vocab_size=vocab_size,
        hardware_file=Path(hardware_file) if hardware_file is not None else None,
        price_per_hour=price_per_hour,
        with_alternatives=with_alternatives,
    )


@speak_python
def run(
    recipe: str | Path,
    *,
    overrides: Overrides = (),
    runs_dir: str | Path = "runs",
    step: str | None = None,
    cell: str | None = None,
    accelerate_config: str | None = None,
    num_processes: int | None = None,
) -> RunRecord:
    """Run a recipe or a pipeline on this machine.

    Returns at its end. Running it again resumes it. Progress appears on stderr. An interrupt saves a checkpoint first.

    Args:
        recipe: The path of a recipe or pipeline.
        overrides: As for load_recipe.
        runs_dir: The folder of run directories.
        step: The only step of a pipeline to run.
        cell: The only cell of a matrix to run.
        accelerate_config: A file in accelerate_configs/ by name (ddp, fsdp, …), or a path. None: one process.
        num_processes: Processes to start on this machine.

    Returns:
        What the run directory holds: `.result` is result.json, `.metrics` the logged lines, `.steps` the runs of a pipeline's steps.

    Raises:
        RecipeError: A recipe is wrong; nothing was started.
        CommandError: A step, cell, config or run directory is wrong; or what one of several processes refused.
        CannotRun: This machine lacks a GPU, a package, memory, disk space or a network.
        RunFailed: The run started and failed.
        Interrupted: A signal ended the run after a checkpoint.
    """
    report = run_isolated(
        run_recipe,
        recipe=recipe,
        overrides=_format_overrides(overrides),
        runs_dir=Path(runs_dir),
        step=step,
        cell=cell,
        accelerate_config=accelerate_config,
        num_processes=num_processes,
        quiet=True,
    )
    if report.error is not None:
        raise report.error
    return read_run(report.path)


@speak_python
def submit(recipe: str | Path, config: str | Path, *, overrides: Overrides = (), **arguments: Any) -> TrainingJob | None:
    """Run a recipe as a SageMaker training job.

    Args:
        recipe: The path of a recipe or pipeline.
        config: The path of a settings file, such as sagemaker/cpt.yaml.
        overrides: As for load_recipe.
        **arguments: What azrecipe.sagemaker.submit takes: options (step, yes, wait, …) and keys of the settings file.

    Returns:
        The job, of a pipeline the last one; None where all runs are complete already.

    Raises:
        RecipeError, CommandError: The recipe, the settings or the arguments are wrong.
        CannotRun: AWS refuses the job, or a check fails.
    """
    from azrecipe.sagemaker import submission

    if "set" in arguments:
        raise CommandError("submit: overrides=… replaces set=…")
    return submission.submit(str(recipe), str(config), set=_format_overrides(overrides), **arguments)


@speak_python
def read_run(path: str | Path) -> RunRecord:
    """Read a run directory, finished or not.

    Args:
        path: runs/<project>/<recipe or pipeline>.

    Returns:
        Its files, each read when it is used: `.state`, `.result`, `.metrics`, `.history`, `.environment`, `.plan`, `.steps`.

    Raises:
        CommandError: The folder holds no run.
    """
    return reader.read_run(Path(path))


def _format_overrides(overrides: Overrides) -> tuple[str, ...]:
    """Format overrides as texts for `--set`."""
    if isinstance(overrides, str):
        raise CommandError(f'overrides: a list of texts or a mapping, not one text: ["{overrides}"]')
    if isinstance(overrides, Mapping):
        return tuple(f"{key}={_format_value(key, value)}" for key, value in overrides.items())
    return tuple(overrides)


def _format_value(key: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        message = (
            f"overrides: {key}: a value is text, a number, True, False, None, a list or a mapping of these, not {type(value).__name__}"
        )
        raise CommandError(message) from None
