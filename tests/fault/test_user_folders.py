"""A run directory that meets the user's own files: they are refused, kept, and never reached through a link."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.training.checkpoints import MARKER, remove_after, remove_incomplete, rotate
from azrecipe.utils.atomic_files import atomic_folder
from tests.conftest import TOKENIZER, Done, write

Cli = Callable[..., Done]
PRETRAIN = """\
stage: pretrain
project: thesis
model: {name_or_path: ./llama}
data: {max_length: 32, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 2}]
training: {global_batch_size: 2, per_device_train_batch_size: 2, precision: float32}
"""
LATE = ("--set", "training.trainer_arguments.hub_strategy=sdg")  # transformers refuses it, after the run directory was opened


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def recipe(project: Path, llama: Path) -> Path:
    """chapters.yaml, whose run directory below `--runs-dir .` is thesis/chapters."""
    (project / "llama").symlink_to(llama)
    return write("chapters.yaml", PRETRAIN)


def test_a_folder_of_the_users_is_refused_and_kept(recipe: Path, cli: Cli) -> None:
    write("thesis/chapters/one.tex", "the only copy")
    before = contents(Path("thesis"))
    for arguments in (("run", recipe, *LATE), ("run", recipe), ("check", recipe)):
        done = cli(*arguments, "--runs-dir", ".")
        assert done.code == 2, done.text
        assert "thesis/chapters: this folder is not empty and holds no run" in done.text, done.text
        assert contents(Path("thesis")) == before


@pytest.mark.parametrize(
    "name", ["final/one.tex", "candidates/custom/one.tex", "checkpoints/one.tex", "recipe.yaml", "status.json", "result.json"]
)
def test_a_folder_of_the_users_with_names_that_runs_use_is_refused(recipe: Path, cli: Cli, name: str) -> None:
    write(f"thesis/chapters/{name}", "the only copy")
    done = cli("run", recipe, "--runs-dir", ".")
    assert done.code == 2, done.text
    assert "Traceback" not in done.text
    assert contents(Path("thesis")) == {f"chapters/{name}": b"the only copy"}


def test_a_folder_that_a_pipeline_would_take_is_refused_and_kept(recipe: Path, cli: Cli) -> None:
    pipeline = write("book.yaml", "stage: pipeline\nproject: thesis\nsteps: [chapters.yaml]\n")
    write("thesis/book/recipe.yaml", "eggs: 3\n")
    done = cli("run", pipeline, "--runs-dir", ".")
    assert done.code == 2, done.text
    assert "thesis/book: this folder is not empty and holds no run" in done.text
    assert contents(Path("thesis")) == {"book/recipe.yaml": b"eggs: 3\n"}


@pytest.mark.usefixtures("project")
def test_a_refused_recipe_keeps_an_empty_folder_and_what_was_put_into_it(recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's file comes while the run is under way; the run is refused after that."""
    from azrecipe.planning import run_estimate

    def put(*_: object) -> None:
        write("thesis/chapters/notes.txt", "the only copy")

    Path("thesis/chapters").mkdir(parents=True)
    assert cli("run", recipe, "--runs-dir", ".", *LATE).code == 2
    assert list(Path("thesis/chapters").iterdir()) == []
    monkeypatch.setattr(run_estimate, "estimate_run", put)  # a moment between the opening and the refusal
    assert cli("run", recipe, "--runs-dir", ".", *LATE).code == 2
    assert Path("thesis/chapters/notes.txt").read_text(encoding="utf-8") == "the only copy"


def test_a_run_directory_behind_a_link_loses_only_what_the_run_wrote(recipe: Path, cli: Cli) -> None:
    disk = Path("disk")
    write(disk / "photos/one.jpg", "the only copy")
    Path("thesis").mkdir()
    Path("thesis/chapters").symlink_to(disk.resolve())
    done = cli("run", recipe, "--runs-dir", ".", *LATE)
    assert done.code == 2 and "not empty and holds no run" in done.text, done.text
    assert contents(disk) == {"photos/one.jpg": b"the only copy"}

    empty = Path("empty")
    empty.mkdir()
    Path("thesis/chapters").unlink()
    Path("thesis/chapters").symlink_to(empty.resolve())
    assert cli("run", recipe, "--runs-dir", ".", *LATE).code == 2
    assert Path("thesis/chapters").is_symlink() and contents(empty) == {}
    done = cli("run", recipe, "--runs-dir", ".", "--quiet")
    assert done.code == 0, done.text
    assert (empty / "final/model.safetensors").is_file()


def test_a_pipeline_with_the_name_of_a_finished_run_is_refused(recipe: Path, cli: Cli) -> None:
    assert cli("run", recipe, "--quiet").code == 0
    before = contents(Path("runs/thesis/chapters"))
    write("deep/other.yaml", PRETRAIN.replace("./", "../").replace("text.txt", "../text.txt").replace("heldout.txt", "../heldout.txt"))
    pipeline = write("deep/chapters.yaml", "stage: pipeline\nproject: thesis\nsteps: [other.yaml]\n")
    done = cli("run", pipeline)
    assert done.code == 2 and "runs/thesis/chapters: this folder holds the run of a recipe" in done.text, done.text
    assert contents(Path("runs/thesis/chapters")) == before


@pytest.mark.parametrize("name", ["final", "candidates", "candidates/custom", "status.json", ".lock"])
def test_links_inside_a_run_directory_are_refused_and_not_followed(project: Path, llama: Path, cli: Cli, name: str) -> None:
    (project / "llama").symlink_to(llama)
    recipe = write("t.yaml", TOKENIZER)
    assert cli("run", recipe, "--quiet").code == 0
    run, disk = Path("runs/p/t"), Path("disk")
    target = disk / Path(name).name
    target.parent.mkdir()
    (run / name).rename(target)
    (run / name).symlink_to(target.resolve())
    before = contents(disk)
    done = cli("run", recipe, "--set", "seed=3")
    assert done.code == 2, done.text
    assert f"{run / name}: a link" in done.text, done.text
    assert contents(disk) == before and (run / name).is_symlink()


def test_a_checkpoint_that_is_a_link_is_neither_deleted_nor_emptied(tmp_path: Path) -> None:
    disk, checkpoints = tmp_path / "disk", tmp_path / "checkpoints"
    write(disk / "weights", "x")
    write(disk / MARKER, '{"weights": 1}')
    checkpoints.mkdir()
    (checkpoints / "checkpoint-1").symlink_to(disk)
    for number in (2, 3):
        write(checkpoints / f"checkpoint-{number}" / MARKER, "{}")
    before = contents(disk)
    for action in (lambda: rotate(checkpoints, 1), lambda: remove_incomplete(checkpoints), lambda: remove_after(checkpoints, 0)):
        action()
        assert contents(disk) == before
        assert (checkpoints / "checkpoint-1").is_symlink()


def test_a_folder_is_not_put_in_the_place_of_a_link(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    write(disk / "one", "the only copy")
    (tmp_path / "final").symlink_to(disk)
    with pytest.raises(OSError, match="a link"), atomic_folder(tmp_path / "final") as folder:
        write(folder / "two", "x")
    assert contents(disk) == {"one": b"the only copy"} and (tmp_path / "final").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "final"]
