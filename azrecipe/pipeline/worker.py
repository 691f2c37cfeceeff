"""One process of a run: what accelerate launch and torchrun start, and what `azrecipe run` is for a single process."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from azrecipe.errors import DONE, FAILED, SIGINT, SIGTERM, AllFailed, AzrecipeError, CommandError, Interrupted, RunFailed, explain
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe
from azrecipe.utils import shipped_files

INTERRUPTED = "interrupted; what was finished is kept, and the same command goes on from there"
EXIT_FILE = "AZRECIPE_EXIT_CODES"  # a folder where processes leave their exit codes: launchers turn every failure into 1
REASON = ".reason"  # behind a rank: a file there with what that process has told of its failure


def start(path: str, sets: Sequence[str], runs_dir: Path, step: str | None = None, cell: str | None = None) -> int:
    """Run one recipe in this process, whatever launched it. Returns the exit code; a failure has been told."""
    main = os.environ.get("RANK", "0") == "0"
    before = signal.signal(signal.SIGTERM, _end)  # a training loop has its own way to end
    try:
        _work(_open(path, sets, step, cell), runs_dir)
        code = DONE
    except KeyboardInterrupt:
        code = SIGINT
        _tell(f"azrecipe: {INTERRUPTED}", main)
    except Exception as error:
        known = explain(error)
        code = known.exit_code if known else FAILED
        if known is None:
            traceback.print_exc()
        if main or not isinstance(known, Interrupted | AllFailed):  # what reaches all, one of them says
            _report(_message(known or RunFailed(f"{type(error).__name__}: {error}")), main)
    finally:
        signal.signal(signal.SIGTERM, before)
    if EXIT_FILE in os.environ:
        Path(os.environ[EXIT_FILE], os.environ.get("RANK", "0")).write_text(str(code), encoding="utf-8")
    return code


def _end(_number: int, _frame: object) -> None:
    raise Interrupted(INTERRUPTED, SIGTERM)


def _report(message: str, main: bool) -> None:
    """Tell a failure. What every process finds, the main one tells; what only another one finds, that one does.

    The wait lets the launcher end the others first where the main process has failed for the same reason.
    """
    if not main:
        time.sleep(3)
        message = f"process {os.environ['RANK']}: {message}"
    _tell(message, True)
    if EXIT_FILE in os.environ:
        Path(os.environ[EXIT_FILE], os.environ.get("RANK", "0") + REASON).write_text(message, encoding="utf-8")


def _open(path: str, sets: Sequence[str], step: str | None, cell: str | None) -> Recipe:
    recipe, _ = open_recipe(shipped_files.find(path), parse_overrides(sets), step, cell)
    if recipe.stage == "pipeline":
        raise CommandError(
            f"{recipe.path} is a pipeline, which starts its own processes: azrecipe run {recipe.path}\n"
            "  or one of its steps in these processes: accelerate launch -m azrecipe … --step NAME.yaml [--cell NAME]"
        )
    return recipe


def _work(recipe: Recipe, runs_dir: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from azrecipe.distributed import backend, local_storage, process_group
    from azrecipe.runs import run_dir

    launched = backend.set_up()
    complete = run_dir.already_complete(recipe, runs_dir)
    if launched.world > 1 and local_storage.apart():  # a machine may have nothing of what the main process' has
        process_group.start_group()
        complete = local_storage.from_main(complete)
    if complete:
        _tell(f"already complete: {run_dir.locate(recipe, runs_dir).path}", launched.main)
        return
    stage = importlib.import_module(f"azrecipe.stages.{recipe.stage}")
    if launched.main:
        where = run_dir.locate(recipe, runs_dir).path
        _tell(f"{recipe.path}: {recipe.stage} → {where}", True)
    _quiet()
    stage.run(recipe, runs_dir, launched)
    _tell(f"complete: {run_dir.locate(recipe, runs_dir).path}", launched.main)
    if launched.world > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _quiet() -> None:
    """Leave the terminal to our own progress: the libraries' bars and notices go."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _message(error: AzrecipeError) -> str:
    from azrecipe.errors import RecipeError

    return str(error) if isinstance(error, RecipeError) else f"azrecipe: {error}"


def _tell(text: str, main: bool) -> None:
    if main:
        print(text, file=sys.stderr, flush=True)
