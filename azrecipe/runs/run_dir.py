"""Write, lock and resume a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from azrecipe.distributed import local_storage
from azrecipe.distributed.process_group import check_shared_storage, start_process_group
from azrecipe.errors import (
    EXIT_FAILED,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    EXIT_WRONG_INPUT,
    CannotRun,
    CommandError,
    Interrupted,
    explain_error,
    suggest_choices,
)
from azrecipe.recipe import schema
from azrecipe.recipe.diff import diff_with_parent, get_stage_value, iter_changed_keys
from azrecipe.recipe.load import CELLS_FOLDER, Recipe
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key, parse_yaml
from azrecipe.runs import event_log, run_files
from azrecipe.runs.environment import collect_environment
from azrecipe.runs.event_log import format_current_time
from azrecipe.utils import environment_variables
from azrecipe.utils.atomic_files import list_file_sizes, read_json, read_json_object, write_json, write_text
from azrecipe.utils.console import format_disk_size
from azrecipe.utils.output_checksums import RESULT_FILE, RESULT_KEY, compute_output_checksums


@dataclass(frozen=True)
class RunDir:
    """The folder of one run.

    Only the main process writes it. Every process may read it, unless each machine has its own (distributed/local_storage.py).
    """

    path: Path
    main: bool
    runs_dir: Path

    @property
    def final_dir(self) -> Path:
        return self.path / "final"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def cache_dir(self) -> Path:
        """The folder of tokenised text, shared by all runs below `runs_dir`.

        AZRECIPE_CACHE names another folder.
        """
        return Path(environment_variables.CACHE.read() or self.runs_dir / ".cache")

    @property
    def status(self) -> dict[str, Any]:
        """The content of status.json; empty before the first run.

        Keys: state, run_id, inputs, started, finished, exit_code, message, and the files of final/ with their sizes.
        """
        return read_json_object(self.path / "status.json")

    @property
    def is_complete(self) -> bool:
        return self.status.get("state") == "complete"

    @property
    def is_uploaded(self) -> bool:
        """Whether all files of final/ have arrived, with local storage.

        Files are uploaded one by one, and status.json may arrive before the others.
        """
        return not local_storage.storage_is_local() or list_file_sizes(self.final_dir) == self.status.get(
            "final", list_file_sizes(self.final_dir)
        )

    def update_status(self, **changes: Any) -> None:
        """Change keys of status.json."""
        if self.main:
            write_json(self.path / "status.json", {**self.status, **changes})

    def mark_complete(self, result: Mapping[str, Any]) -> None:
        """Write result.json, with the checksums of what the run leaves.

        Then mark the run complete."""
        if self.main:
            checksums = compute_output_checksums(self.path)
            write_json(self.path / RESULT_FILE, {**result, **({RESULT_KEY: checksums} if checksums else {})})
        final = {"final": list_file_sizes(self.final_dir)} if local_storage.storage_is_local() else {}
        self.update_status(state="complete", exit_code=0, message="", finished=format_current_time(), **final)
        if self.main:
            event_log.log_event(self.path, "complete")

    def mark_failed(self, state: str, exit_code: int, message: str) -> None:
        """Record how an incomplete run ended."""
        with contextlib.suppress(OSError):  # a full disk must not hide the reason of the failure
            self.update_status(state=state, exit_code=exit_code, message=message, finished=format_current_time())
            if self.main:
                event_log.log_event(self.path, state, exit_code=exit_code, message=message)

    def require_disk_space(self, size: int, purpose: str) -> None:
        """Raise CannotRun where the disk lacks `size` bytes."""
        existing = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < size:
            raise CannotRun(
                f"{self.path}: {purpose} needs about {format_disk_size(size)} of disk and {format_disk_size(free)} are free. "
                "Free some, or use --runs-dir"
            )


def locate_run(recipe: Recipe, runs_dir: Path, main: bool = True) -> RunDir:
    """Return the folder of a recipe's run. Creates nothing."""
    return locate_named_run(recipe, runs_dir, recipe.name, main)


def locate_named_run(recipe: Recipe, runs_dir: Path, name: str, main: bool = False) -> RunDir:
    """Return the folder of the run `name` as seen from a recipe.

    It is <runs_dir>/<project>/<name>, or <runs_dir>/<project>/cells/<cell>/<name> where the recipe is in a cell that repeats
    that run. All paths of runs come from here. Creates nothing.

    Args:
        recipe: The recipe that refers to the run.
        runs_dir: The folder of all projects.
        name: The name of the run's recipe.
        main: Whether this is the main process.
    """
    cell, project = recipe.find_cell(name), runs_dir / recipe.project
    return RunDir((project / CELLS_FOLDER / cell if cell else project) / name, main, runs_dir)


def find_upstream_run(recipe: Recipe, runs_dir: Path, output_of: str, *keys: Key) -> RunDir:
    """Return the complete run that `output_of` names.

    Raises RecipeError at the location of `keys` where the run is not complete.
    """
    name = Path(output_of).stem
    run = locate_named_run(recipe, runs_dir, name)
    if not run.is_complete:
        state = run.status.get("state")
        reason = f"its run in {run.path} is not complete ({state})" if state else f"it has not been run: there is no {run.path}"
        cell = recipe.find_cell(name)
        advice = f"Run it first: {f'that step of cell {cell}' if cell else f'azrecipe run {output_of}'}"
        raise recipe.error(f"takes the output of {output_of}, but {reason}. {advice}", *keys)
    return run


def find_candidate_folder(recipe: Recipe, run: RunDir, name: str, *keys: Key) -> Path:
    """Return the folder of one candidate of a tokenizer's complete run.

    Raises RecipeError at the location of `keys` where there is no such candidate.
    """
    candidates = [candidate["name"] for candidate in (read_json(run.path / "result.json") or {}).get("candidates", [])]
    folder = run.path / "candidates" / name
    if name not in candidates:
        advice = suggest_choices(name, candidates, "Candidates") if candidates else ": it is no run of a tokenizer recipe"
        raise recipe.error(f"{run.path} has no candidate '{name}'{advice}", *keys)
    if not folder.is_dir():
        raise recipe.error(f"there is no {folder}, which that run should have left. Remove {run.path} and run it again", *keys)
    return folder


@contextlib.contextmanager
def open_run(recipe: Recipe, run: RunDir, inputs: Mapping[str, str]) -> Iterator[None]:
    """Create or resume a run directory and lock it within the block.

    Args:
        recipe: The recipe of the run.
        run: Its folder.
        inputs: What the run reads: run ids of other recipes, hashes of files.

    Raises:
        CommandError: The folder holds another recipe's run, or the inputs have changed.
        CannotRun: Another process has locked the folder, or it cannot be written.
    """
    check_run_matches(recipe, run, inputs)
    if not run.main:
        yield
        return
    try:
        folder_existed = run.path.is_dir()
        run.path.mkdir(parents=True, exist_ok=True)
        with (run.path / run_files.LOCK_NAME).open("a") as lock:
            _lock_folder(lock, run.path)
            status = run.status
            is_new = not (run.path / "recipe.yaml").exists()
            run_files.check_run_folder(run.path)  # again, now that no other process can write here
            write_recipe_files(recipe, run)
            write_json(run.path / "environment.json", collect_environment() | _describe_attention(recipe.config))
            run.update_status(state="running", run_id=status.get("run_id") or uuid.uuid4().hex, inputs=dict(inputs), recipe=str(recipe.path),
                       started=status.get("started") or format_current_time(), resumed=status.get("resumed", -1) + 1, exit_code=None, message="", finished=None)  # fmt: skip
            event_log.log_start(run.path)
            with _record_failure(run, is_new=is_new, folder_existed=folder_existed):
                yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise CannotRun(f"{error.filename}: cannot be written: {error.strerror}") from None


def _describe_attention(config: Any) -> dict[str, str]:
    """Return the attention of a run that has one, for environment.json."""
    holder: Any = config if hasattr(config, "attn_implementation") else getattr(config, "model", None)
    name = getattr(holder, "attn_implementation", None)
    return {} if name is None else {"attn_implementation": name}


@contextlib.contextmanager
def _record_failure(run: RunDir, *, is_new: bool, folder_existed: bool) -> Iterator[None]:
    """Record in status.json an exception that ends the block.

    The files of a new run are removed where the recipe is wrong. Otherwise the corrected recipe would be refused, as the
    folder would hold the run of another recipe. An empty folder that the user made stays.
    """
    try:
        yield
    except BaseException as error:
        user_error = explain_error(error)
        recipe_is_wrong = is_new and user_error is not None and user_error.exit_code == EXIT_WRONG_INPUT
        if recipe_is_wrong and run_files.remove_bookkeeping(run.path, folder_existed):
            raise
        state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        code = user_error.exit_code if user_error else EXIT_SIGINT if isinstance(error, KeyboardInterrupt) else EXIT_FAILED
        run.mark_failed(state, code, str(user_error or f"{type(error).__name__}: {error}"))
        raise


def record_unreported_end(run: RunDir, exit_code: int, message: str, *, is_known: bool) -> None:
    """Record how a run ended, for a main process that could not.

    Args:
        run: The run, seen from a process that waited for it.
        exit_code: The exit code of the run.
        message: Why it ended.
        is_known: Whether the message is better than what the main process recorded, which saw only that another one was gone.
    """
    state = run.status.get("state")
    if state != "running" and not (is_known and state in ("failed", "interrupted")):
        return
    with contextlib.suppress(OSError, CannotRun), (run.path / run_files.LOCK_NAME).open("a") as lock:
        _lock_folder(lock, run.path)  # held: another command runs this recipe
        run.mark_failed("interrupted" if exit_code in (EXIT_SIGINT, EXIT_SIGTERM) else "failed", exit_code, message)


def is_already_complete(recipe: Recipe, runs_dir: Path) -> bool:
    """Whether this recipe's run is complete.

    Raises CommandError where the folder holds another recipe's run, or one with inputs that have changed.
    """
    run = locate_run(recipe, runs_dir)
    run_files.check_run_folder(run.path)
    if not run.is_complete or not run.is_uploaded:
        return False
    check_run_matches(recipe, run)
    for key, run_id in run.status.get("inputs", {}).items():
        if key.startswith("run of "):
            other = locate_named_run(recipe, runs_dir, Path(key.removeprefix("run of ")).stem)
            if other.is_complete and other.status.get("run_id") != run_id:
                raise CommandError(
                    f"{run.path} was made from an earlier {key.removeprefix('run of ')} than the one that is there now. Remove that folder to run it again"
                )
    return True


def connect_processes(run: RunDir, inputs: Mapping[str, str]) -> Any:
    """Start the process group; return this process' device.

    Raises CannotRun where a process does not see the run directory, or sees other inputs.
    """
    state = start_process_group()
    if local_storage.storage_is_local():
        local_storage.check_same_inputs(run.path / "status.json", inputs)
    else:
        check_shared_storage(run.path / "status.json", str(run.status.get("run_id")) if run.main else "")
    return state.device


def write_recipe_files(recipe: Recipe, run: RunDir) -> None:
    """Write recipe.yaml, the resolved recipe, and parent.json.

    parent.json holds the recipe's differences from its parent. A file with the right content is not written again.
    """
    parent_diff = json.dumps(diff_with_parent(recipe), indent=2, ensure_ascii=False) + "\n"
    for name, text in (("recipe.yaml", to_yaml(recipe.data)), ("parent.json", parent_diff)):
        file = run.path / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)


def _lock_folder(lock: IO[str], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CannotRun(f"{path}: another process is running this recipe") from None


def check_run_matches(recipe: Recipe, run: RunDir, inputs: Mapping[str, str] | None = None) -> None:
    """Raise CommandError where the folder does not fit recipe and inputs.

    It fits if it is empty or holds a run of this recipe with these inputs.
    """
    run_files.check_run_folder(run.path)
    check_recipe_matches(recipe, run, inputs)


def check_recipe_matches(recipe: Recipe, run: RunDir, inputs: Mapping[str, str] | None = None) -> None:
    """Check a folder that may lack some of a run's files."""
    file = run.path / "recipe.yaml"
    if not file.exists():
        return
    old = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    new = parse_yaml(to_yaml(recipe.data), "")
    differing = sorted(iter_changed_keys(old, new, schema.load_schema(recipe.stage) if get_stage_value(old) == recipe.stage else {}))
    if differing:
        raise CommandError(
            f"{run.path} holds the run of another recipe. Keys that differ: {', '.join(differing)}\n"
            "  Give this one a project or a --runs-dir of its own, or remove that folder"
        )
    before = run.status.get("inputs", {})
    changed = sorted(key for key, value in (inputs or {}).items() if before.get(key, value) != value)
    if changed:
        raise CommandError(
            f"{run.path} was made from inputs that have changed since: {', '.join(changed)}\n"
            "  Remove that folder to run it again from the start, or give a --runs-dir of its own"
        )
