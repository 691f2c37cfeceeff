"""Files that are whole or not there: writes that fail, processes that die, locks and hashes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from azrecipe.utils import atomic_files
from tests.conftest import ROOT, write

WRITER = """
import os, signal, sys
from pathlib import Path
from azrecipe.utils.atomic_files import atomic_folder, write_text
path = Path(sys.argv[1])
with atomic_folder(path) as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
LOCKER = """
import sys, time
from pathlib import Path
from azrecipe.utils.atomic_files import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def start(code: str, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "one.txt"
    atomic_files.write_text(file, "bir")
    atomic_files.write_text(file, "ikinci dəfə")
    assert file.read_text(encoding="utf-8") == "ikinci dəfə" and list_names(file.parent) == ["one.txt"]


def test_a_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    file = write(tmp_path / "one.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_files.write_text(file, "x" * 100_000 + "\ud800")  # fails after much was written
    assert file.read_text() == "old" and list_names(tmp_path) == ["one.txt"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        atomic_files.write_text(tmp_path / "taken", "text")
    assert list_names(tmp_path) == ["one.txt", "taken"]


def test_json_is_read_as_it_was_written_and_none_without_a_file(tmp_path: Path) -> None:
    data = {"ə": [1, 2.5, None], "nested": {"a": True}}
    atomic_files.write_json(tmp_path / "a.json", data)
    assert atomic_files.read_json(tmp_path / "a.json") == data
    assert "ə" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert atomic_files.read_json(tmp_path / "b.json") is None
    write(tmp_path / "torn.json", '{"a": ')
    with pytest.raises(ValueError):
        atomic_files.read_json(tmp_path / "torn.json")


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with atomic_files.atomic_folder(target) as folder:
        write(folder / "deep" / "a", "12345")
        assert not target.exists()
    assert atomic_files.list_file_sizes(target) == {"deep/a": 5} and list_names(tmp_path) == ["final"]
    with pytest.raises(RuntimeError), atomic_files.atomic_folder(target) as folder:
        write(folder / "b", "x")
        raise RuntimeError
    assert atomic_files.list_file_sizes(target) == {"deep/a": 5} and list_names(tmp_path) == ["final"]


@pytest.mark.parametrize(("replace", "left"), [(True, {"new": 3}), (False, {"old": 3})])
def test_a_folder_that_is_there_is_replaced_or_stays(tmp_path: Path, replace: bool, left: dict[str, int]) -> None:
    write(tmp_path / "final" / "old", "old")
    with atomic_files.atomic_folder(tmp_path / "final", replace=replace) as folder:
        write(folder / "new", "new")
    assert atomic_files.list_file_sizes(tmp_path / "final") == left and list_names(tmp_path) == ["final"]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "final"
    process = start(WRITER, target)
    assert process.wait() == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == f".final.{socket.gethostname()}.{process.pid}.tmp" and not target.exists()
    alive = write(tmp_path / f".final.{socket.gethostname()}.{os.getppid()}.tmp" / "a", "x")
    elsewhere = write(tmp_path / f".final.another-host.{process.pid}.tmp" / "a", "x")  # may be alive there
    with atomic_files.atomic_folder(target) as folder:
        write(folder / "a", "x")
    assert not left.exists() and alive.exists() and elsewhere.exists()


def test_a_file_that_another_program_writes_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = write(tmp_path / "model.gguf", "old")
    with atomic_files.atomic_file(target) as path:
        path.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    with pytest.raises(FileNotFoundError), atomic_files.atomic_file(target):
        pass  # the program wrote nothing
    assert target.read_bytes() == b"new" and list_names(tmp_path) == ["model.gguf"]


def test_a_full_disk_is_an_error_and_not_a_short_file() -> None:
    with pytest.raises(OSError) as error:
        atomic_files.append_json_lines(Path("/dev/full"), [{"a": 1}])
    assert error.value.errno == errno.ENOSPC


def test_lines_are_appended_and_a_torn_last_one_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lines.jsonl"
    assert atomic_files.read_and_repair_lines(file) == []
    atomic_files.append_json_lines(file, [{"n": 1}, {"n": "ə"}])
    whole = file.read_bytes()
    for torn in (b'{"n": 3', '{"n": "ə'.encode()[:-1]):  # in the middle of a number, or of a letter's two bytes
        file.write_bytes(whole + torn)
        assert atomic_files.read_and_repair_lines(file) == [{"n": 1}, {"n": "ə"}]
        assert file.read_bytes() == whole
    atomic_files.append_json_lines(file, [{"n": 3}])
    assert [json.loads(line)["n"] for line in file.read_text(encoding="utf-8").splitlines()] == [1, "ə", 3]


def test_a_lock_is_waited_for_and_a_dead_process_holds_none(tmp_path: Path) -> None:
    path, waited = tmp_path / "cache" / ".lock", []
    path.parent.mkdir()
    process = start(LOCKER, path)

    def kill() -> None:
        waited.append(time.monotonic())
        process.kill()

    with atomic_files.hold_lock(path, on_wait=kill):
        assert process.wait() == -signal.SIGKILL
    assert len(waited) == 1
    with atomic_files.hold_lock(path, on_wait=kill):
        pass
    assert len(waited) == 1


def test_a_hash_follows_the_content(tmp_path: Path) -> None:
    file = write(tmp_path / "a", "abc")
    assert atomic_files.hash_file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = file.stat()
    write(file, "abd")  # as long as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert atomic_files.hash_file(file) == "a52d159f262b2c6ddb724a61840befc36eb30c88877a4030b65cbe86298449c9"


def test_a_tree_is_synced_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "12")
    write(tmp_path / "c", "")
    assert atomic_files.sync_tree(tmp_path) == {"a/b": 2, "c": 0}
    assert atomic_files.list_file_sizes(tmp_path / "nothing") == {}
