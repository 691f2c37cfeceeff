"""Sources of text: shares by weight, held-out sides, kinds of files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.data.readers import DataSource
from azrecipe.data.sources import mix_documents, read_texts
from azrecipe.errors import RecipeError, SourceLocation
from azrecipe.recipe.types import HeldOut, TextSource
from azrecipe.utils.paths import is_local_data, is_s3
from tests.conftest import jsonl, write


def source(path: Path | str, weight: float = 1, **keys: object) -> DataSource:
    return DataSource(TextSource(path=str(path), split="train", weight=weight, **keys), SourceLocation("r.yaml", 1, 1))  # type: ignore[arg-type]


def zstd(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def documents(count: int, size: int, letter: str) -> str:
    return jsonl(*({"text": letter * size, "n": n} for n in range(count)))


def test_without_a_length_the_mix_ends_with_the_first_source_and_its_shares_hold(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", documents(80, 100, "a"))
    write(tmp_path / "b.jsonl", documents(500, 100, "b"))
    given = [i for i, _ in mix_documents([source(tmp_path / "a.jsonl", 4), source(tmp_path / "b.jsonl", 1)], None)]
    assert given.count(0) == 80
    assert given.count(1) in (20, 21)


def test_with_a_length_the_others_go_on_when_a_source_runs_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", documents(10, 100, "a"))
    write(tmp_path / "b.jsonl", documents(500, 100, "b"))
    given = [i for i, _ in mix_documents([source(tmp_path / "a.jsonl"), source(tmp_path / "b.jsonl")], 20_000)]
    assert (given.count(0), given.count(1)) == (10, 190)


def test_the_two_sides_of_a_split_are_disjoint_complete_and_follow_the_group(tmp_path: Path) -> None:
    rows = [{"text": f"document {n}", "site": f"site{n % 20}"} for n in range(200)]
    write(tmp_path / "a.jsonl", jsonl(*rows))
    split = source(tmp_path / "a.jsonl", held_out=HeldOut(0.3, "site"))
    train, held = list(read_texts(split)), list(read_texts(split, held_out_side=True))
    assert sorted(train + held) == sorted(row["text"] for row in rows)
    site = {row["text"]: row["site"] for row in rows}
    assert not {site[t] for t in train} & {site[t] for t in held}
    assert held


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet", "glob", "folder"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    wanted = ["Birinci sənəd.\n\nİkinci abzas.", "Third ə document"]
    path: Path | str = tmp_path / f"a.{kind}"
    if kind.startswith("jsonl"):
        data = "".join(json.dumps({"text": text}) + "\n" for text in wanted).encode()
        write(path, gzip.compress(data) if kind.endswith("gz") else zstd(data[:9]) + zstd(data[9:]) if kind.endswith("zst") else data)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": wanted}), path)
    else:
        for n, text in enumerate(wanted):
            name = f"d/{n}.txt.gz" if kind == "txt.gz" else f"d/{n}.txt"
            write(tmp_path / name, gzip.compress(text.encode()) if kind == "txt.gz" else text)
        path = tmp_path / "d" if kind == "folder" else f"{tmp_path}/d/*.txt*"
    assert list(read_texts(source(path))) == wanted


def test_max_bytes_ends_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", documents(10, 100, "ə"))
    assert len(list(read_texts(source(tmp_path / "a.jsonl", max_bytes=401)))) == 3


def test_a_document_that_is_not_text_is_told_by_its_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": 5}\n')
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: .*a.jsonl:3:1: column 'text' holds int, not text"):
        list(read_texts(source(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("torn", [lambda data: data[:-9], lambda data: data + b"rubbish", lambda _: b"no zstd"])
def test_a_torn_zstd_file_is_told(tmp_path: Path, torn: Callable[[bytes], bytes]) -> None:
    whole = zstd(documents(5000, 20, "a").encode())
    write(tmp_path / "a.jsonl.zst", torn(whole + whole))
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: .*a.jsonl.zst: cannot be read: "):
        list(read_texts(source(tmp_path / "a.jsonl.zst")))


def test_s3_is_neither_local_nor_the_hub() -> None:
    assert not is_local_data("s3://bucket/a.jsonl")
    assert is_s3("s3://bucket/a.jsonl")
    assert source("s3://bucket/a.jsonl").title == "s3://bucket/a.jsonl"
    with pytest.raises(RecipeError, match="a file has no split 'test'"):
        list(read_texts(DataSource(TextSource(path="s3://bucket/a.jsonl", split="test"), SourceLocation("r.yaml", 1, 1))))
