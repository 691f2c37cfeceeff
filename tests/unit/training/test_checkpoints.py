"""Checkpoints: which are complete, which one a run goes on from, which are deleted, and which backend reads which."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import xxhash

from azrecipe.distributed.backend import Backend
from azrecipe.errors import CommandError
from azrecipe.training import checkpoints
from tests.conftest import ROOT, write
from tests.small import called
from tests.unit.training.small_trainer import SINGLE

WORKER = Path(__file__).with_name("two_processes.py")
FILES = {"model.safetensors": "x" * 100, "state/optimizer.pt": "y" * 50}


def write_checkpoint(folder: Path, step: int, *, marked: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        write(checkpoint / name, content)
    if marked:
        checkpoints.finalize(checkpoint, SINGLE)
    return checkpoint


def list_steps(folder: Path) -> list[int]:
    return sorted(checkpoints.get_step(path) for path in folder.iterdir())


def test_a_checkpoint_is_complete_once_its_marker_is_written(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 4, marked=False)
    assert not checkpoints.is_complete(checkpoint) and checkpoints.find_last_complete(tmp_path) is None
    sizes = checkpoints.sync_checkpoint(checkpoint, SINGLE)
    assert not checkpoints.is_complete(checkpoint)
    checkpoints.write_marker(checkpoint, sizes)
    assert checkpoints.is_complete(checkpoint) and checkpoints.find_last_complete(tmp_path) == checkpoint
    marker = json.loads((checkpoint / checkpoints.MARKER).read_text())
    files = [*FILES, checkpoints.BACKEND_FILE]
    assert marker == {
        name: {"size": (checkpoint / name).stat().st_size, "xxh3_128": xxhash.xxh3_128((checkpoint / name).read_bytes()).hexdigest()}
        for name in files
    }
    assert json.loads((checkpoint / checkpoints.BACKEND_FILE).read_text()) == {"kind": "single", "processes": 1, "format": None}


@pytest.mark.parametrize(
    "damage", ["short", "long", "missing", "torn marker", "empty marker", "no marker", "{}", "[1]", "5", '{"a": "b"}', "torn backend"]
)
def test_a_damaged_checkpoint_is_passed_over_and_removed(tmp_path: Path, damage: str) -> None:
    older, newest = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    optimizer, marker = newest / "state" / "optimizer.pt", newest / checkpoints.MARKER
    if damage in ("short", "long"):
        optimizer.write_text("y" * (49 if damage == "short" else 51))
    elif damage == "missing":
        optimizer.unlink()
    elif damage == "no marker":
        marker.unlink()
    elif damage == "torn backend":
        content = (newest / checkpoints.BACKEND_FILE).read_text()
        write(newest / checkpoints.BACKEND_FILE, content.replace("}", " "))
    elif damage in ("{}", "[1]", "5", '{"a": "b"}'):
        marker.write_text(damage)
    else:
        marker.write_text("" if damage == "empty marker" else marker.read_text()[:20])
    assert not checkpoints.is_complete(newest)
    assert checkpoints.find_latest_common(tmp_path) == (older, "")
    checkpoints.remove_incomplete(tmp_path)
    assert list_steps(tmp_path) == [9]


@pytest.mark.parametrize("name", [*FILES, checkpoints.BACKEND_FILE])
def test_changed_content_is_noticed_before_it_is_used(tmp_path: Path, name: str) -> None:
    older, newest = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    content = bytearray((newest / name).read_bytes())
    content[2 if name == checkpoints.BACKEND_FILE else -1] = ord(" ")  # one byte; still JSON
    (newest / name).write_bytes(content.replace(b"single", b"sinkle"))
    found = checkpoints.find_latest_common(tmp_path)
    assert found.path == older
    assert f"checkpoint-10: {name} is not what was written (its checksum differs)" in found.warning
    checkpoints.remove_incomplete(tmp_path)
    assert list_steps(tmp_path) == [9]


def test_a_marker_without_checksums_is_used_and_said(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 9, marked=False)
    checkpoints.write_marker(checkpoint, {name: len(text) for name, text in FILES.items()})
    found = checkpoints.find_latest_common(tmp_path)
    assert found.path == checkpoint and "checkpoint-9 has no checksums" in found.warning


def test_a_link_in_the_place_of_a_checkpoint_is_not_touched(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "elsewhere", 9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-9").symlink_to(checkpoint)
    assert checkpoints.find_latest_common(tmp_path / "run").path is None
    checkpoints.remove_incomplete(tmp_path / "run")
    checkpoints.rotate(tmp_path / "run", 1)
    assert checkpoints.is_complete(checkpoint)


def test_checkpoints_are_in_the_order_of_steps_not_of_names(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in checkpoints.list_complete(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert checkpoints.find_latest_common(tmp_path) == (tmp_path / "checkpoint-100", "")
    assert checkpoints.find_latest_common(tmp_path / "nothing") == (None, "")


def test_rotation_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 10, marked=False)
    checkpoints.rotate(tmp_path, 2)
    assert list_steps(tmp_path) == [6, 8, 10]
    checkpoints.rotate(tmp_path, 5)
    assert list_steps(tmp_path) == [6, 8, 10]


def test_later_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    checkpoints.remove_after(tmp_path, 4)
    assert list_steps(tmp_path) == [2, 4]


def test_files_of_other_machines_count_once_they_are_here(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2, marked=False)
    checkpoints.finalize(checkpoint, SINGLE, {"shard-1.bin": 7})
    assert not checkpoints.is_complete(checkpoint)
    write(checkpoint / "shard-1.bin", "7 bytes")
    assert checkpoints.is_complete(checkpoint)


def test_a_marker_of_another_machine_is_not_taken_for_a_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With local storage files are uploaded one by one: a checkpoint may lack some here, and nothing is deleted for it."""
    monkeypatch.setenv("AZRECIPE_STORAGE", "local")
    checkpoint = write_checkpoint(tmp_path, 2)
    assert checkpoints.find_latest_common(tmp_path) == (checkpoint, "")
    (checkpoint / "model.safetensors").unlink()
    assert checkpoints.find_latest_common(tmp_path) == (None, "")
    assert list_steps(tmp_path) == [2]


READABLE = {
    ("single", 1, "single", 1): True,
    ("single", 1, "ddp", 4): True,
    ("ddp", 4, "single", 1): True,
    ("ddp", 4, "ddp", 3): True,
    ("ddp", 4, "fsdp2", 4): False,
    ("single", 1, "zero2", 2): False,
    ("fsdp2", 4, "fsdp2", 2): True,
    ("fsdp2", 4, "hsdp", 4): True,
    ("hsdp", 4, "fsdp2", 2): True,
    ("fsdp2", 2, "single", 1): False,
    ("zero2", 2, "zero2", 2): True,
    ("zero2", 2, "zero2", 4): False,
    ("zero2", 2, "zero3", 2): False,
    ("zero3", 2, "ddp", 2): False,
}


@pytest.mark.parametrize(("writer", "writers", "reader", "readers"), READABLE)
def test_a_backend_reads_what_it_can_and_refuses_the_rest(tmp_path: Path, writer: str, writers: int, reader: str, readers: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "phase", 2, marked=False)
    checkpoints.finalize(checkpoint, Backend(writer, writers, 0))
    backend = Backend(reader, readers, 0)
    if READABLE[writer, writers, reader, readers]:
        checkpoints.check_readable(tmp_path, backend)
        return
    with pytest.raises(CommandError) as error:
        checkpoints.check_readable(tmp_path, backend)
    processes = f"{writers} process{'es' if writers > 1 else ''}"
    assert f"{checkpoint} was written by {writer} with {processes}, and {reader} with {readers} cannot go on from it" in str(error.value)
    if writer.startswith("zero"):
        assert f"Go on with --accelerate-config {writer} --num-processes {writers}" in str(error.value)


def test_fsdp_refuses_another_state_dict_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("fsdp2", 2, 0)
    checkpoints.finalize(write_checkpoint(tmp_path, 2, marked=False), backend)
    checkpoints.check_readable(tmp_path, backend)
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    with pytest.raises(CommandError, match="fsdp_state_dict_type: SHARDED_STATE_DICT"):
        checkpoints.check_readable(tmp_path, backend)


def test_only_the_newest_complete_checkpoint_has_to_be_readable(tmp_path: Path) -> None:
    checkpoints.finalize(write_checkpoint(tmp_path, 2, marked=False), Backend("zero2", 2, 0))
    write_checkpoint(tmp_path, 4)
    checkpoints.check_readable(tmp_path, SINGLE)
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(CommandError, match="checkpoint-2 was written by zero2"):
        checkpoints.check_readable(tmp_path, SINGLE)


def test_a_checkpoint_without_a_backend_is_an_old_one_of_ddp(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2, marked=False)
    checkpoints.write_marker(checkpoint, {"model.safetensors": 100})
    checkpoints.check_readable(tmp_path, SINGLE)
    with pytest.raises(CommandError, match="was written by ddp with 1 process"):
        checkpoints.check_readable(tmp_path, Backend("fsdp2", 2, 0))


def test_machines_without_shared_storage_agree_on_a_checkpoint(tmp_path: Path) -> None:
    """Two processes with a folder each: what one lacks none goes on from, and nobody deletes what only all have together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), "checkpoints", tmp_path]
    done = called([str(word) for word in command], ROOT)
    assert done.code == 0, done.err
    for rank, answers in enumerate(json.loads(done.out.splitlines()[-1])):
        folder = tmp_path / f"machine{rank}"
        assert answers["same"] == str(folder / "checkpoint-4")
        assert answers["one is behind"] == str(folder / "checkpoint-2")
        assert answers["warning"] == "checkpoint-4 is incomplete for process 1: going on from checkpoint-2"
        assert answers["left"] == ["checkpoint-2"]
        assert f"{folder}/checkpoint-2 is complete on all machines together and not on each" in answers["scattered"]


def test_a_copy_by_another_name_is_the_user_s(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-best"):
        write(tmp_path / name / "weights", "w")
    write(tmp_path / "checkpoint-notes.txt", "the only copy")
    for name in ("checkpoint-2", "checkpoint-4"):
        checkpoints.write_marker(tmp_path / name, {"weights": 1})
    assert [path.name for path in checkpoints.list_complete(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    checkpoints.remove_incomplete(tmp_path)
    checkpoints.remove_after(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-best", "checkpoint-notes.txt"]
