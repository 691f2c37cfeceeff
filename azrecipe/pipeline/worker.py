"""One process of a run.

accelerate launch and torchrun start several; for a single process `azrecipe run` is one itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import (
    EXIT_FAILED,
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
from azrecipe.pipeline.exit_folder import ExitFolder
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe
from azrecipe.runs.run_dir import RunDir, locate_run
from azrecipe.utils import shipped_files
from azrecipe.utils.console import print_progress
from azrecipe.utils.environment_variables import EXIT_CODES
from azrecipe.utils.parent_watch import ParentProbe
from azrecipe.utils.process_watch import ProcessWatch, list_stop_signals

INTERRUPTED_MESSAGE = "interrupted; finished work is kept, and the same command resumes there"


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
    process = _WorkerProcess()
    with process.watch_signals():
        try:
            process.run_stage(_open_single_recipe(path, overrides, step, cell), runs_dir)
            result = WorkerResult(EXIT_SUCCESS)
        except KeyboardInterrupt:
            result = WorkerResult(EXIT_SIGINT, Interrupted(INTERRUPTED_MESSAGE, EXIT_SIGINT))
            print_progress(f"azrecipe: {INTERRUPTED_MESSAGE}", process.main)
        except Exception as error:
            user_error = explain_error(error)
            if user_error is None:
                print_progress(traceback.format_exc().rstrip("\n"))
                user_error = RunFailed(f"{type(error).__name__}: {error}")
            result = WorkerResult(user_error.exit_code, user_error.with_traceback(None))  # whose frames hold the model
            if process.main or not isinstance(user_error, Interrupted | AllProcessesFailed):  # one process reports what happens to all
                process.report_failure(_format_error(user_error))
    if process.folder is not None:
        process.folder.write_code(process.rank, result.exit_code)
    return result


class _WorkerProcess:
    """This process: its rank, its exit files and its signals."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.main = self.rank == 0
        self.folder = ExitFolder(Path(EXIT_CODES.read())) if EXIT_CODES.is_set else None
        self.lock = self.folder.hold_rank_lock(self.rank) if self.folder is not None else None  # until this process ends
        self.run: RunDir | None = None

    @contextlib.contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Handle signals, and watch the parent.

        A training loop replaces the handlers."""
        with ProcessWatch(self._find_parent(), self._record_forced_end) as watch:

            def interrupt(number: int, _frame: object) -> None:
                if watch.is_stopping:  # a launcher repeats a signal, while this process is ending
                    return
                watch.acknowledge_stop()
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                raise Interrupted(INTERRUPTED_MESSAGE, EXIT_SIGTERM)

            old_handlers = {number: signal.signal(number, interrupt) for number in list_stop_signals()}
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, list_stop_signals())  # the launcher blocked them
                yield
            finally:
                for number, handler in old_handlers.items():
                    signal.signal(number, handler)

    def _find_parent(self) -> ParentProbe | None:
        """Find out whether a launcher started this process, which then ends with it.

        What a user starts may outlive the shell.
        """
        lock_file = self.folder.launcher_lock if self.folder is not None else None
        has_lock = lock_file is not None and lock_file.exists()
        has_launcher = "TORCHELASTIC_RUN_ID" in os.environ or ("ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ)
        return ParentProbe(lock_file=lock_file) if has_lock or has_launcher else None

    def run_stage(self, recipe: Recipe, runs_dir: Path) -> None:
        """Run the recipe's stage."""
        self.run = locate_run(recipe, runs_dir, self.main)
        _run_stage(recipe, runs_dir)

    def report_failure(self, message: str) -> None:
        """Print a failure, and write it to the folder of exit codes.

        A process other than the main one waits first: if the main process fails for the same reason, the launcher ends this one.
        """
        if not self.main:
            try:
                _announce_failure(message)
                time.sleep(3)
            except (Interrupted, KeyboardInterrupt):
                return
            message = f"process {self.rank}: {message}"
        print_progress(message)
        if self.folder is not None:
            self.folder.write_reason(self.rank, message)
        if self.main:
            _announce_failure(message)

    def _record_forced_end(self, exit_code: int, message: str) -> None:
        """Record that the watch ends this process; called in its thread."""
        message = message if self.main else f"process {self.rank}: {message}"
        print_progress(f"azrecipe: {message}")
        if self.folder is not None:
            self.folder.write_reason(self.rank, message)
            self.folder.write_code(self.rank, EXIT_FAILED)  # where another process failed, its own code counts
        if self.run is not None and self.main and self.run.status.get("state") == "running":
            self.run.mark_failed("interrupted", exit_code, message)


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
    if backend.world_size > 1:
        process_group.record_collectives(locate_run(recipe, runs_dir).path)
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


def _announce_failure(message: str) -> None:
    """Tell the processes of other machines, which may wait for this one."""
    if "WORLD_SIZE" not in os.environ:
        return
    from azrecipe.distributed import process_group

    process_group.announce_failure(message.removeprefix("azrecipe: "))


def _format_error(error: AzrecipeError) -> str:
    return str(error) if isinstance(error, RecipeError) else f"azrecipe: {error}"
