"""One process of a run.

accelerate launch and torchrun start several; for a single process `azrecipe run` is one itself.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import (
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_SUCCESS,
    AllProcessesFailed,
    AzrecipeError,
    CommandError,
    Interrupted,
    RecipeError,
    RunFailed,
    explain_error,
)
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe
from azrecipe.utils import shipped_files
from azrecipe.utils.console import print_progress
from azrecipe.utils.environment_variables import EXIT_CODES

INTERRUPTED_MESSAGE = "interrupted; finished work is kept, and the same command resumes there"
REASON_SUFFIX = ".reason"  # of a file in the folder of exit codes, named by a rank, with that process' error message


@dataclass(frozen=True)
class WorkerResult:
    """How one process of a run ended; error is None after a success."""

    exit_code: int
    error: AzrecipeError | None = None


def run_worker(path: str, overrides: Sequence[str], runs_dir: Path, step: str | None = None, cell: str | None = None) -> WorkerResult:
    """Run one recipe in this process, and print a failure.

    Args:
        path: The recipe, as on the command line.
        overrides: KEY=VALUE overrides.
        runs_dir: The folder of run directories.
        step: A step of a pipeline.
        cell: A cell of a pipeline's matrix.

    Returns:
        The exit code, and the failure that was printed.
    """
    main = os.environ.get("RANK", "0") == "0"
    old_handler = signal.signal(signal.SIGTERM, _raise_interrupted)  # a training loop replaces it
    try:
        _run_stage(_open_single_recipe(path, overrides, step, cell), runs_dir)
        result = WorkerResult(EXIT_SUCCESS)
    except KeyboardInterrupt:
        result = WorkerResult(EXIT_SIGINT, Interrupted(INTERRUPTED_MESSAGE, EXIT_SIGINT))
        print_progress(f"azrecipe: {INTERRUPTED_MESSAGE}", main)
    except Exception as error:
        user_error = explain_error(error)
        if user_error is None:
            print_progress(traceback.format_exc().rstrip("\n"))
            user_error = RunFailed(f"{type(error).__name__}: {error}")
        result = WorkerResult(user_error.exit_code, user_error.with_traceback(None))  # whose frames hold the model
        if main or not isinstance(user_error, Interrupted | AllProcessesFailed):  # one process reports what happens to all
            _report_failure(_format_error(user_error), main)
    finally:
        signal.signal(signal.SIGTERM, old_handler)
    if EXIT_CODES.is_set:
        Path(EXIT_CODES.read(), os.environ.get("RANK", "0")).write_text(str(result.exit_code), encoding="utf-8")
    return result


def _raise_interrupted(_number: int, _frame: object) -> None:
    raise Interrupted(INTERRUPTED_MESSAGE, EXIT_SIGTERM)


def _report_failure(message: str, main: bool) -> None:
    """Print a failure, and write it to the folder of exit codes.

    A process other than the main one waits first: if the main process fails for the same reason, the launcher ends this one.
    """
    if not main:
        time.sleep(3)
        message = f"process {os.environ['RANK']}: {message}"
    print_progress(message)
    if EXIT_CODES.is_set:
        Path(EXIT_CODES.read(), os.environ.get("RANK", "0") + REASON_SUFFIX).write_text(message, encoding="utf-8")


def _open_single_recipe(path: str, overrides: Sequence[str], step: str | None, cell: str | None) -> Recipe:
    recipe, _ = open_recipe(shipped_files.resolve_shipped_path(path), parse_overrides(overrides), step, cell)
    if recipe.stage == "pipeline":
        raise CommandError(
            f"{recipe.path} is a pipeline, which starts its own processes: azrecipe run {recipe.path}\n"
            "  or one of its steps in these processes: accelerate launch -m azrecipe … --step NAME.yaml [--cell NAME]"
        )
    return recipe


def _run_stage(recipe: Recipe, runs_dir: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from azrecipe.distributed import local_storage, process_group
    from azrecipe.distributed.backend import set_up_backend
    from azrecipe.runs import run_dir

    backend = set_up_backend()
    complete = run_dir.is_already_complete(recipe, runs_dir)
    if backend.world_size > 1 and local_storage.storage_is_local():  # another machine may lack the main process' run directory
        process_group.start_process_group()
        complete = local_storage.broadcast_from_main(complete)
    if complete:
        print_progress(f"already complete: {run_dir.locate_run(recipe, runs_dir).path}", backend.main)
        return
    stage = importlib.import_module(f"azrecipe.stages.{recipe.stage}")
    print_progress(f"{recipe.path}: {recipe.stage} → {run_dir.locate_run(recipe, runs_dir).path}", backend.main)
    _silence_libraries()
    stage.run(recipe, runs_dir, backend)
    print_progress(f"complete: {run_dir.locate_run(recipe, runs_dir).path}", backend.main)
    if backend.world_size > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _silence_libraries() -> None:
    """Turn off the progress bars and notices of libraries."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _format_error(error: AzrecipeError) -> str:
    return str(error) if isinstance(error, RecipeError) else f"azrecipe: {error}"
