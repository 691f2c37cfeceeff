"""A large file is read once by one process of a machine, and again when it changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.utils import shared_digests
from azrecipe.utils.checksums import compute_checksum, find_damaged_file
from azrecipe.utils.shared_digests import get_digest_folder, hash_large_file, name_launch, share_digest

SIZE = 1 << 20
MEASURE = """
import sys
from pathlib import Path
from azrecipe.utils import shared_digests
shared_digests.LARGE_BYTES = 1 << 18
def count_read():
    return int(Path("/proc/self/io").read_text().split()[1])
before = count_read()
print(shared_digests.hash_large_file(Path(sys.argv[1])), count_read() - before)
"""


@pytest.fixture
def large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shared_digests, "LARGE_BYTES", 1 << 18)
    monkeypatch.setattr(shared_digests, "TICK_SECONDS", 0.01)
    file = tmp_path / "large.jsonl"
    file.write_bytes(os.urandom(SIZE))
    return file


def test_of_processes_that_start_together_one_reads(large_file: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(large_file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate()[0].split() for process in processes]
    assert {digest for digest, _ in answers} == {hashlib.sha256(large_file.read_bytes()).hexdigest()}
    assert sum(int(num_bytes) >= SIZE for _, num_bytes in answers) == 1


@pytest.mark.parametrize("change", ["content", "content with its old time", "another file"])
def test_a_changed_file_is_read_again(large_file: Path, change: str) -> None:
    before, stat = hash_large_file(large_file), large_file.stat()
    if change == "another file":
        other = large_file.with_suffix(".new")
        other.write_bytes(os.urandom(SIZE))
        other.replace(large_file)
    else:
        with large_file.open("r+b") as file:
            file.write(b"changed!")
        if change.endswith("time"):
            os.utime(large_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hash_large_file(large_file) == hashlib.sha256(large_file.read_bytes()).hexdigest() != before


@pytest.mark.parametrize("content", ["", "no digest", "abc"])
def test_a_damaged_record_is_made_again(large_file: Path, content: str) -> None:
    digest = share_digest(large_file, "xxh3", compute_checksum)
    (record,) = get_digest_folder().glob("*")
    record.write_text(content)
    assert share_digest(large_file, "xxh3", compute_checksum) == digest == record.read_text()


def test_small_files_and_folders_that_cannot_be_written_share_nothing(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = large_file.with_name("small.txt")
    small.write_text("x")
    assert hash_large_file(small) == hashlib.sha256(b"x").hexdigest()
    assert not get_digest_folder().exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(small))
    assert hash_large_file(large_file) == hashlib.sha256(large_file.read_bytes()).hexdigest()


def test_old_records_are_removed(large_file: Path) -> None:
    share_digest(large_file, "a", compute_checksum)
    (record,) = get_digest_folder().glob("*")
    os.utime(record, (0, 0))
    share_digest(large_file, "b", compute_checksum)
    assert len(list(get_digest_folder().glob("*"))) == 1


def test_progress_is_printed(large_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shared_digests, "PROGRESS_SECONDS", -1.0)
    hash_large_file(large_file)
    assert f"reading {large_file} to know its content: 0.0 GB of 0.0 GB" in capsys.readouterr().err


def test_another_launch_reads_a_cache_again(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checksums = {large_file.name: compute_checksum(large_file)}
    assert name_launch() == name_launch()
    assert find_damaged_file(large_file.parent, checksums, "launch 1") is None
    record = next(get_digest_folder().glob("*"))
    record.write_text("0" * 32)  # as if the disk had changed behind the file's times
    assert find_damaged_file(large_file.parent, checksums, "launch 1") == large_file.name
    assert find_damaged_file(large_file.parent, checksums, "launch 2") is None


def test_the_hash_of_a_data_file_is_shared(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azrecipe.data.files import DataFile

    content_id: Callable[[], str] = lambda: DataFile(str(large_file)).content_id  # noqa: E731
    assert content_id() == hashlib.sha256(large_file.read_bytes()).hexdigest()
    assert len(list(get_digest_folder().glob("*.txt"))) == 1
