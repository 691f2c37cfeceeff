"""Which folder is a run directory, and what of a refused run may be removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import CommandError
from azrecipe.runs.run_files import check_pipeline_folder, check_run_folder, remove_bookkeeping
from tests.conftest import write

STATUS = '{"state": "failed", "run_id": "0123456789abcdef0123456789abcdef"}'


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "files",
    [
        {},
        {".lock": "", "recipe.yaml": "stage: pretrain"},  # killed right after its start
        {".lock": "", ".status.json.17.tmp": "{"},
        {"status.json": STATUS, "notes.txt": "the user's"},
        {"environment.json": '{"azrecipe": "0.1.0", "python": "3.11.7", "versions": {}}', "final/model": "w"},
        {"steps.json": '{"steps": [{"step": "a.yaml", "cell": null, "run": "p/a"}]}'},
        {"steps.json": '{"steps": []}'},
    ],
)
def test_a_run_s_folder_or_an_empty_one_is_taken(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    check_run_folder(tmp_path)
    check_run_folder(tmp_path / "not there")
    assert list_files(tmp_path) == sorted(files)


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "the only copy"},
        {"recipe.yaml": "eggs: 3"},  # without the lock it is nobody's
        {".lock": "", "thesis.tex": "the only copy"},
        {"status.json": '{"state": "married"}'},
        {"status.json": '{"state": "running", "job": 17}', "final/thesis.docx": "the only copy"},  # another program's
        {"status.json": '{"state": "running", "run_id": 17}'},
        {"steps.json": '{"steps": ["write the introduction"]}', "final/thesis.docx": "the only copy"},
        {"environment.json": '{"azrecipe": "a fish"}'},
        {".lock": "held by an editor"},
        {".draft.tmp": "the only copy"},
        {".lock": "", ".chapter.17.tmp": "the only copy"},
        {"status.json": "[]"},
        {"status.json": '{"state": '},
        {"final/model": "w"},
    ],
)
def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(CommandError, match="this folder is not empty and holds no run"):
        check_run_folder(tmp_path)
    assert list_files(tmp_path) == sorted(files)


def test_uploaded_files_that_came_first_are_a_run_with_local_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "final" / "model", "w")
    write(tmp_path / "metrics.jsonl.sagemaker-uploading", "")
    monkeypatch.setenv("AZRECIPE_STORAGE", "local")
    check_run_folder(tmp_path)
    write(tmp_path / "thesis.tex", "the only copy")
    with pytest.raises(CommandError, match="holds no run"):
        check_run_folder(tmp_path)


def test_a_file_or_a_broken_link_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (write(tmp_path / "file", ""), tmp_path / "link"):
        with pytest.raises(CommandError, match="a file or a broken link is in the place of the run directory"):
            check_run_folder(path)


def test_links_inside_are_refused_and_the_folder_itself_may_be_one(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    write(run / "status.json", STATUS)
    disk.mkdir()
    (tmp_path / "alias").symlink_to(run)
    check_run_folder(tmp_path / "alias")
    (run / "checkpoints" / "full").mkdir(parents=True)
    (run / "checkpoints" / "full" / "checkpoint-1").symlink_to(disk)
    with pytest.raises(CommandError, match="checkpoint-1: a link inside a run directory"):
        check_run_folder(run)


BOOKKEEPING = ("recipe.yaml", "parent.json", "environment.json", "status.json", "history.jsonl", ".lock", ".status.json.17.tmp")


@pytest.mark.parametrize("keep_folder", [True, False])
def test_bookkeeping_of_a_refused_run_is_removed(tmp_path: Path, keep_folder: bool) -> None:
    run = tmp_path / "run"
    for name in BOOKKEEPING:
        write(run / name, "")
    (run / "checkpoints" / "all").mkdir(parents=True)
    assert remove_bookkeeping(run, keep_folder)
    assert run.exists() is keep_folder and (not keep_folder or list(run.iterdir()) == [])


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "final/model", "deep/er/status.json"])
def test_nothing_is_removed_where_there_is_anything_else(tmp_path: Path, name: str) -> None:
    for file in (*BOOKKEEPING, name):
        write(tmp_path / "run" / file, "")
    assert not remove_bookkeeping(tmp_path / "run", keep_folder=False)
    assert list_files(tmp_path / "run") == sorted((*BOOKKEEPING, name))


def test_a_link_is_neither_followed_nor_removed(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "photo", "the only copy")
    write(tmp_path / "run" / "status.json", "")
    (tmp_path / "run" / "final").symlink_to(tmp_path / "disk")
    assert not remove_bookkeeping(tmp_path / "run", keep_folder=False)
    assert list_files(tmp_path / "disk") == ["photo"] and (tmp_path / "run" / "status.json").exists()
    (tmp_path / "alias").symlink_to(tmp_path / "empty")
    write(tmp_path / "empty" / "status.json", "")
    assert remove_bookkeeping(tmp_path / "alias", keep_folder=False)
    assert (tmp_path / "alias").is_symlink() and list((tmp_path / "empty").iterdir()) == []


def test_a_pipeline_takes_no_folder_of_a_recipe_s_run(tmp_path: Path) -> None:
    check_pipeline_folder(tmp_path)
    write(tmp_path / "steps.json", '{"steps": []}')
    check_pipeline_folder(tmp_path)
    write(tmp_path / "status.json", STATUS)
    with pytest.raises(CommandError, match="holds the run of a recipe, not a pipeline"):
        check_pipeline_folder(tmp_path)


@pytest.mark.parametrize("names", [("final",), ("models", "checkpoints"), ("final", "models", "checkpoints", "adapter")])
def test_folders_that_any_program_has_are_no_run_with_local_storage(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZRECIPE_STORAGE", "local")
    for name in names:
        write(tmp_path / "p" / "r" / name / "model.bin", "mine")
    with pytest.raises(CommandError, match="holds no run of azrecipe"):
        check_run_folder(tmp_path / "p" / "r")
    write(tmp_path / "p" / "r" / "checkpoints" / "checkpoint-4" / "COMPLETE.json", "{}")
    check_run_folder(tmp_path / "p" / "r")
