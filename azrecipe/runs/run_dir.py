"""The run directory: what happened, for people and for the next run. Knows its layout and when it may be gone on with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from azrecipe.distributed import local_storage
from azrecipe.distributed.process_group import share, start_group
from azrecipe.errors import FAILED, SIGINT, WRONG, CannotRun, CommandError, Interrupted, explain, hint
from azrecipe.recipe import schema
from azrecipe.recipe.diff import changed_keys, differences, stage_word
from azrecipe.recipe.load import CELLS, Recipe
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key, parse
from azrecipe.runs import event_log, run_files
from azrecipe.runs.environment import environment
from azrecipe.runs.event_log import now
from azrecipe.utils.atomic_files import file_sizes, read_json, write_json, write_text

CACHE = "AZRECIPE_CACHE"


@dataclass(frozen=True)
class RunDir:
    """One run's folder. Only the main process writes; every process may read, unless machines have one each (distributed/local_storage.py)."""

    path: Path
    main: bool
    runs_dir: Path

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def cache(self) -> Path:
        """Tokenised text, shared by all runs below one runs directory; AZRECIPE_CACHE names another place."""
        return Path(os.environ.get(CACHE) or self.runs_dir / ".cache")

    @property
    def status(self) -> dict[str, Any]:
        """status.json: state, run_id, inputs, started, finished, exit_code, message; files of final/ and their sizes. Empty before the first run."""
        return read_json(self.path / "status.json") or {}

    @property
    def complete(self) -> bool:
        return self.status.get("state") == "complete"

    @property
    def uploaded(self) -> bool:
        """Whether final/ is whole where machines are apart: files are uploaded one by one, and status.json may be there before them."""
        return not local_storage.apart() or file_sizes(self.final) == self.status.get("final", file_sizes(self.final))

    def update(self, **changes: Any) -> None:
        """Change keys of status.json."""
        if self.main:
            write_json(self.path / "status.json", {**self.status, **changes})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json and mark the run complete: the last thing that a stage does."""
        if self.main:
            write_json(self.path / "result.json", result)
        final = {"final": file_sizes(self.final)} if local_storage.apart() else {}
        self.update(state="complete", exit_code=0, message="", finished=now(), **final)
        if self.main:
            event_log.note(self.path, "complete")

    def fail(self, state: str, exit_code: int, message: str) -> None:
        """Record how a run ended that did not complete. A full disk must not hide the reason of the failure."""
        with contextlib.suppress(OSError):
            self.update(state=state, exit_code=exit_code, message=message, finished=now())
            if self.main:
                event_log.note(self.path, state, exit_code=exit_code, message=message)

    def need(self, size: int, what: str) -> None:
        """Refuse to start when the disk has less than `size` bytes free for `what`."""
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if free < size:
            raise CannotRun(
                f"{self.path}: {what} needs about {_gigabytes(size)} of disk and {_gigabytes(free)} are free. Free some, or use --runs-dir"
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def locate(recipe: Recipe, runs_dir: Path, main: bool = True) -> RunDir:
    """The folder of a recipe's run. Touches nothing."""
    return run_of(recipe, runs_dir, recipe.name, main)


def run_of(recipe: Recipe, runs_dir: Path, name: str, main: bool = False) -> RunDir:
    """The run of the recipe called `name` as `recipe` sees it. Touches nothing.

    <runs_dir>/<project>/<name>, or <runs_dir>/<project>/cells/<cell>/<name> where `recipe` stands in a cell that
    repeats that recipe. Every path of a run is made here.
    """
    cell, project = recipe.cell_of(name), runs_dir / recipe.project
    return RunDir((project / CELLS / cell if cell else project) / name, main, runs_dir)


def upstream(recipe: Recipe, runs_dir: Path, output_of: str, *keys: Key) -> RunDir:
    """The complete run that an `output_of` takes from. Raises RecipeError, at its place, where there is none."""
    name = Path(output_of).stem
    run = run_of(recipe, runs_dir, name)
    if not run.complete:
        state = run.status.get("state")
        why = f"its run in {run.path} is not complete ({state})" if state else f"it has not been run: there is no {run.path}"
        cell = recipe.cell_of(name)
        first = f"Run it first: {f'that step of cell {cell}' if cell else f'azrecipe run {output_of}'}"
        raise recipe.problem(f"takes the output of {output_of}, but {why}. {first}", *keys)
    return run


def candidate_of(recipe: Recipe, run: RunDir, name: str, *keys: Key) -> Path:
    """The folder of one candidate of a tokenizer's complete run. Raises RecipeError, at its place, where there is none."""
    known = [candidate["name"] for candidate in (read_json(run.path / "result.json") or {}).get("candidates", [])]
    folder = run.path / "candidates" / name
    if name not in known:
        tail = hint(name, known, "Candidates") if known else ": it is no run of a tokenizer recipe"
        raise recipe.problem(f"{run.path} has no candidate '{name}'{tail}", *keys)
    if not folder.is_dir():
        raise recipe.problem(f"there is no {folder}, which that run should have left. Remove {run.path} and run it again", *keys)
    return folder


@contextlib.contextmanager
def opened(recipe: Recipe, run: RunDir, inputs: Mapping[str, str]) -> Iterator[None]:
    """Take a run directory for this recipe, new or to go on with, and hold it against other processes.

    `inputs` name what the run takes from elsewhere (run ids of other recipes, hashes of files). Raises CommandError
    when the folder holds another recipe's run or the inputs have changed, CannotRun when another process is in it.
    """
    check_same(recipe, run, inputs)
    if not run.main:
        yield
        return
    try:
        kept = run.path.is_dir()  # an empty folder that somebody made for this run stays when the run is refused
        run.path.mkdir(parents=True, exist_ok=True)
        with (run.path / run_files.LOCK).open("a") as lock:
            _take(lock, run.path)
            status = run.status
            fresh = not (run.path / "recipe.yaml").exists()
            run_files.check_folder(run.path)  # again, now that no other process can write here
            asked(recipe, run)
            write_json(run.path / "environment.json", environment())
            run.update(state="running", run_id=status.get("run_id") or uuid.uuid4().hex, inputs=dict(inputs), recipe=str(recipe.path),
                       started=status.get("started") or now(), resumed=status.get("resumed", -1) + 1, exit_code=None, message="", finished=None)  # fmt: skip
            event_log.started(run.path)
            with _recorded(run, fresh, kept):
                yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise CannotRun(f"{error.filename}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _recorded(run: RunDir, fresh: bool, kept: bool) -> Iterator[None]:
    """Leave in status.json how the run ended if it ends by an exception; a recipe that is refused leaves nothing.

    `fresh`: this start made the run; `kept`: its folder was there before.
    """
    try:
        yield
    except BaseException as error:
        told = explain(error)
        refused = fresh and told is not None and told.exit_code == WRONG
        if refused and run_files.remove_notes(run.path, kept):
            raise  # nothing is left: the recipe, once corrected, would find the run of another one in its way
        state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        code = told.exit_code if told else SIGINT if isinstance(error, KeyboardInterrupt) else FAILED
        run.fail(state, code, str(told or f"{type(error).__name__}: {error}"))
        raise


def already_complete(recipe: Recipe, runs_dir: Path) -> bool:
    """Whether this recipe's run is complete. Raises CommandError where the folder holds another recipe's, or a stale one."""
    run = locate(recipe, runs_dir)
    run_files.check_folder(run.path)
    if not run.complete or not run.uploaded:
        return False
    check_same(recipe, run)
    for key, run_id in run.status.get("inputs", {}).items():
        if key.startswith("run of "):
            other = run_of(recipe, runs_dir, Path(key.removeprefix("run of ")).stem)
            if other.complete and other.status.get("run_id") != run_id:
                raise CommandError(
                    f"{run.path} was made from an earlier {key.removeprefix('run of ')} than the one that is there now. Remove that folder to run it again"
                )
    return True


def connect(run: RunDir, inputs: Mapping[str, str]) -> Any:
    """Start the process group; returns this process' device. Refused where a process does not see the run directory, or other inputs."""
    state = start_group()
    if local_storage.apart():
        local_storage.agree(run.path / "status.json", inputs)
    else:
        share(run.path / "status.json", str(run.status.get("run_id")) if run.main else "")
    return state.device


def asked(recipe: Recipe, run: RunDir) -> None:
    """Leave what was asked for: recipe.yaml, resolved, and parent.json, how it differs from its parent. What is there already is not touched."""
    parent = json.dumps(differences(recipe), indent=2, ensure_ascii=False) + "\n"
    for name, text in (("recipe.yaml", to_yaml(recipe.data)), ("parent.json", parent)):
        file = run.path / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)


def _take(lock: IO[str], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CannotRun(f"{path}: another process is running this recipe") from None


def check_same(recipe: Recipe, run: RunDir, inputs: Mapping[str, str] | None = None) -> None:
    """Raise CommandError unless the folder is empty or holds this recipe's run, with these inputs."""
    run_files.check_folder(run.path)
    check_same_recipe(recipe, run, inputs)


def check_same_recipe(recipe: Recipe, run: RunDir, inputs: Mapping[str, str] | None = None) -> None:
    """`check_same` for a folder that may hold only some of a run's files."""
    file = run.path / "recipe.yaml"
    if not file.exists():
        return
    old = parse(file.read_text(encoding="utf-8"), str(file))
    new = parse(to_yaml(recipe.data), "")
    differing = sorted(changed_keys(old, new, schema.document(recipe.stage) if stage_word(old) == recipe.stage else {}))
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
