"""A run directory: created, locked, resumed, refused, and how it records its end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import CannotRun, CommandError, Interrupted, RecipeError, RunFailed
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.runs import run_dir
from azrecipe.runs.run_dir import RunDir, open_run
from azrecipe.utils.checksums import compute_checksum
from tests.conftest import write

TEXT = """
stage: pretrain
project: p
model: {name_or_path: ./llama}
data: {max_length: 32, datasets: [{path: text.jsonl}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 2}]
training: {global_batch_size: 2, per_device_train_batch_size: 2, precision: float32}
"""
CHILD = """
stage: pretrain
extends: r.yaml
model: {name_or_path: null, output_of: r.yaml}
"""
INPUTS = {"text.jsonl": "hash 1"}


@pytest.fixture
def recipe(project: Path) -> Recipe:
    return load_recipe(write("r.yaml", TEXT))


def locate(recipe: Recipe) -> RunDir:
    return run_dir.locate_run(recipe, Path("runs"))


def run(recipe: Recipe, inputs: dict[str, str] = INPUTS, error: BaseException | None = None) -> dict[str, Any]:
    """Open the run, write a result or raise; returns its status."""
    directory = locate(recipe)
    with open_run(recipe, directory, inputs):
        assert directory.status["state"] == "running"
        if error is not None:
            raise error
        write(directory.final_dir / "model", "weights")
        directory.mark_complete({"answer": 1})
    return directory.status


def test_a_new_run_records_what_it_is_made_of(recipe: Recipe) -> None:
    status = run(recipe)
    path = locate(recipe).path
    assert path == Path("runs/p/r")
    assert (status["state"], status["exit_code"], status["resumed"], status["inputs"]) == ("complete", 0, 0, INPUTS)
    checksums = {"final/model": compute_checksum(path / "final" / "model")}
    assert json.loads((path / "result.json").read_text()) == {"answer": 1, "checksums": checksums}
    assert (path / "recipe.yaml").read_text() == to_yaml(recipe.data)
    assert "azrecipe" in json.loads((path / "environment.json").read_text())
    assert [json.loads(line)["event"] for line in (path / "history.jsonl").read_text().splitlines()] == ["started", "complete"]
    assert run_dir.is_already_complete(recipe, Path("runs"))


def test_a_resumed_run_keeps_its_id_and_start(recipe: Recipe) -> None:
    with pytest.raises(RunFailed):
        run(recipe, error=RunFailed("no luck"))
    first = locate(recipe).status
    assert (first["state"], first["exit_code"], first["message"]) == ("failed", 1, "no luck")
    assert not run_dir.is_already_complete(recipe, Path("runs"))
    second = run(recipe)
    assert (second["run_id"], second["started"], second["resumed"]) == (first["run_id"], first["started"], 1)
    assert second["state"] == "complete" and second["message"] == ""


@pytest.mark.parametrize(
    ("error", "state", "code", "message"),
    [
        (Interrupted("stopped", 143), "interrupted", 143, "stopped"),
        (KeyboardInterrupt(), "interrupted", 130, "KeyboardInterrupt"),
        (CannotRun("no disk"), "failed", 3, "no disk"),
        (OSError(28, "No space left on device", "weights"), "failed", 3, "the disk is full (weights)"),
        (ZeroDivisionError("a defect"), "failed", 1, "ZeroDivisionError: a defect"),
    ],
)
def test_the_end_of_a_run_is_recorded(recipe: Recipe, error: BaseException, state: str, code: int, message: str) -> None:
    with pytest.raises(type(error)):
        run(recipe, error=error)
    status = locate(recipe).status
    assert (status["state"], status["exit_code"]) == (state, code)
    assert status["message"].startswith(message)


def test_a_wrong_recipe_leaves_no_folder_and_a_resumed_run_stays(recipe: Recipe) -> None:
    path = locate(recipe).path
    with pytest.raises(CommandError):
        run(recipe, error=CommandError("wrong"))
    assert not path.exists()
    with pytest.raises(RunFailed):
        run(recipe, error=RunFailed("no luck"))
    with pytest.raises(CommandError):
        run(recipe, error=CommandError("wrong"))
    assert locate(recipe).status["state"] == "failed"


def test_another_recipe_is_refused_with_its_keys_and_a_note_is_no_difference(recipe: Recipe) -> None:
    run(recipe)
    other = load_recipe(write("r.yaml", TEXT.replace("max_steps: 2", "max_steps: 3").replace("1e-3", "2e-3")))
    with pytest.raises(CommandError, match=r"runs/p/r holds the run of another recipe\. Keys that differ: .*learning_rate.*max_steps"):
        run(other)
    run_dir.check_run_matches(load_recipe(write("r.yaml", TEXT + "description: The same.\n")), locate(recipe), INPUTS)


def test_changed_inputs_are_refused_by_name(recipe: Recipe) -> None:
    run(recipe)
    with pytest.raises(CommandError, match=r"made from inputs that have changed since: text\.jsonl"):
        run(recipe, {"text.jsonl": "hash 2"})
    assert locate(recipe).status["state"] == "complete"


def test_a_run_under_way_is_not_opened_again(recipe: Recipe) -> None:
    directory = locate(recipe)
    with open_run(recipe, directory, INPUTS):
        before = directory.status
        with pytest.raises(CannotRun, match="runs/p/r: another process is running this recipe"):
            run(recipe)
        assert directory.status == before
    assert run(recipe)["resumed"] == 1


def test_other_processes_write_nothing(recipe: Recipe) -> None:
    directory = run_dir.locate_run(recipe, Path("runs"), main=False)
    with open_run(recipe, directory, INPUTS):
        directory.mark_complete({})
        directory.mark_failed("failed", 1, "")
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_made_is_said_in_words(recipe: Recipe) -> None:
    write("runs/p", "a file")
    with pytest.raises(CannotRun, match="runs/p/r: cannot be written: Not a directory"):
        run(recipe)


def test_a_failure_on_a_full_disk_keeps_its_reason(recipe: Recipe) -> None:
    """status.json cannot be written: a folder is in its place."""
    directory = locate(recipe)
    with pytest.raises(RunFailed, match="the reason"), open_run(recipe, directory, INPUTS):
        (directory.path / "status.json").unlink()
        (directory.path / "status.json").mkdir()
        raise RunFailed("the reason")


def test_space_is_asked_of_the_disk_before_a_folder_is_there(recipe: Recipe) -> None:
    directory = locate(recipe)
    directory.require_disk_space(1, "a model")
    with pytest.raises(CannotRun, match=r"a model needs about 1000000000.0 GB of disk and [\d.]+ GB are free"):
        directory.require_disk_space(10**18, "a model")
    assert not directory.path.exists()


def test_an_upstream_run_has_to_be_complete(recipe: Recipe) -> None:
    child = load_recipe(write("child.yaml", CHILD))
    with pytest.raises(RecipeError, match=r"child.yaml:4:.*it has not been run: there is no runs/p/r. Run it first: azrecipe run"):
        run_dir.find_upstream_run(child, Path("runs"), "r.yaml", "model", "output_of")
    with pytest.raises(Interrupted):
        run(recipe, error=Interrupted("stopped", 143))
    with pytest.raises(RecipeError, match=r"its run in runs/p/r is not complete \(interrupted\)"):
        run_dir.find_upstream_run(child, Path("runs"), "r.yaml", "model", "output_of")
    run(recipe)
    assert run_dir.find_upstream_run(child, Path("runs"), "r.yaml", "model", "output_of").path == locate(recipe).path


def test_a_run_made_from_an_earlier_one_is_not_complete(recipe: Recipe) -> None:
    """The upstream run is removed and made again: what was made from the first is refused."""
    child = load_recipe(write("child.yaml", CHILD))
    run(child, {"run of r.yaml": run(recipe)["run_id"]})
    assert run_dir.is_already_complete(child, Path("runs"))
    shutil.rmtree(locate(recipe).path)
    assert run_dir.is_already_complete(child, Path("runs"))  # nothing to compare with
    run(recipe)
    with pytest.raises(CommandError, match=r"was made from an earlier r\.yaml than the one that is there now"):
        run_dir.is_already_complete(child, Path("runs"))


def test_with_local_storage_a_complete_run_has_all_its_files(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZRECIPE_STORAGE", "local")
    assert run(recipe)["final"] == {"model": 7}
    assert run_dir.is_already_complete(recipe, Path("runs"))
    (locate(recipe).final_dir / "model").write_text("w")  # the upload was cut off
    assert locate(recipe).is_complete and not run_dir.is_already_complete(recipe, Path("runs"))


def test_the_cache_is_shared_by_runs_and_may_lie_elsewhere(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZRECIPE_CACHE", raising=False)
    assert locate(recipe).cache_dir == Path("runs/.cache")
    monkeypatch.setenv("AZRECIPE_CACHE", "/elsewhere")
    assert locate(recipe).cache_dir == Path("/elsewhere")


def test_recipe_files_are_written_when_they_change_only(recipe: Recipe) -> None:
    run(recipe)
    file = locate(recipe).path / "recipe.yaml"
    os.utime(file, ns=(1, 1))
    run_dir.write_recipe_files(recipe, locate(recipe))
    assert file.stat().st_mtime_ns == 1
    write(file, "torn")
    run_dir.write_recipe_files(recipe, locate(recipe))
    assert file.read_text() == to_yaml(recipe.data)
