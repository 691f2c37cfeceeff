"""Files of text: opened whatever their compression, named by their content, and errors of disks and S3 in words."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import pyarrow
import pytest

from azrecipe.data import files
from azrecipe.data.files import DataFile
from azrecipe.errors import CannotRun, RecipeError, SourceLocation
from tests.conftest import write

TEXT = "Kənddə bir qoca yaşayırdı.\n" * 4000
PLACE = SourceLocation("r.yaml", 3, 9)


@pytest.fixture
def texts(tmp_path: Path) -> list[DataFile]:
    """The same text in three files."""
    content = TEXT.encode()
    write(tmp_path / "a.txt", content)
    write(tmp_path / "a.jsonl.gz", gzip.compress(content))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(content)
    return [DataFile(str(tmp_path / name)) for name in ("a.txt", "a.jsonl.gz", "a.jsonl.zst")]


def test_compressed_files_are_read_as_what_is_in_them(texts: list[DataFile]) -> None:
    assert [file.format for file in texts] == ["txt", "jsonl", "jsonl"]
    assert DataFile("s3://bucket/deep/b.parquet").format == "parquet" and DataFile("s3://bucket/deep/b.parquet").base_name == "b.parquet"
    for file in texts:
        with file.open() as stream:
            assert stream.read().decode() == TEXT
        with file.open() as stream:
            assert stream.readline() == "Kənddə bir qoca yaşayırdı.\n".encode()
        assert str(file) == file.path


def test_a_torn_file_is_an_error_and_not_less_text(texts: list[DataFile]) -> None:
    for file in texts[1:]:
        whole = Path(file.path).read_bytes()
        Path(file.path).write_bytes(whole[: len(whole) // 2])
        with pytest.raises((EOFError, OSError, zlib.error)), file.open() as stream:
            while stream.read(1 << 16):
                pass


def test_a_local_file_is_its_content_and_one_on_s3_its_path_size_and_time(tmp_path: Path) -> None:
    one, same, other = (DataFile(str(write(tmp_path / name, text))) for name, text in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")))
    assert one.content_id == same.content_id != other.content_id
    assert DataFile("s3://bucket/a.txt", 3, 5).content_id == "s3://bucket/a.txt 3 5"
    assert DataFile("s3://bucket/a.txt", 3, 6).content_id != DataFile("s3://bucket/a.txt", 3, 5).content_id


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("b/*.txt", ["b/a.txt"], ["b/a.jsonl", "b/c/a.txt", "c/a.txt", "b/a.txt/d"]),
        ("b/**/*.txt", ["b/a.txt", "b/c/a.txt", "b/c/d/a.txt"], ["b/a.jsonl", "c/a.txt"]),
        ("b/part-[0-4]?.txt", ["b/part-07.txt"], ["b/part-57.txt", "b/part-0.txt", "b/PART-07.txt"]),
    ],
)
def test_a_glob_on_s3_means_what_it_does_on_a_disk(pattern: str, matches: list[str], others: list[str]) -> None:
    for key in matches:
        assert files._matches(key.split("/"), pattern.split("/")), key
    for key in others:
        assert not files._matches(key.split("/"), pattern.split("/")), key


@pytest.mark.parametrize("path", ["s3://*/a.txt", "s3:///a.txt"])
def test_a_bucket_is_a_name(path: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"r.yaml:3:9: no such file on S3: {path}")):
        files.list_s3_files(path, PLACE)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError("When reading: AWS Error NO_SUCH_KEY during GetObject operation: gone"), RecipeError, "r.yaml:3:9: no such file on S3: s3://b/a.txt (NO_SUCH_KEY"),
        (OSError("When reading: AWS Error ACCESS_DENIED during GetObject operation: no"), CannotRun, "r.yaml:3:9: S3 denies access to s3://b/a.txt: ACCESS_DENIED"),
        (OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation"), CannotRun, "r.yaml:3:9: S3 cannot be reached for s3://b/a.txt: NETWORK_CONNECTION"),
        (EOFError("Compressed file ended"), RecipeError, "r.yaml:3:9: s3://b/a.txt: cannot be read: Compressed file ended"),
    ],
)  # fmt: skip
def test_errors_of_s3_are_told_apart(error: Exception, kind: type[Exception], message: str) -> None:
    explained = DataFile("s3://b/a.txt").explain_read_error(error, PLACE)
    assert isinstance(explained, kind) and message in str(explained)


def test_a_local_file_that_cannot_be_read_is_named_with_its_place(tmp_path: Path) -> None:
    file = DataFile(str(tmp_path / "folder.txt"))
    Path(file.path).mkdir()
    with pytest.raises(OSError) as error:
        file.open()
    assert str(file.explain_read_error(error.value, PLACE)) == f"r.yaml:3:9: {file.path}: cannot be read: Is a directory"
