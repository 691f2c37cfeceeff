"""Documents without end, bombs and broken text: bounded memory, and a message with the file and the place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.data import readers
from azrecipe.data.cleaning_report import CleaningReport
from azrecipe.data.conversations import read_conversations
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import describe_source, read_texts
from azrecipe.errors import RecipeError, SourceLocation
from azrecipe.recipe.types import ConversationSource, Filters
from tests.conftest import Done, jsonl, write
from tests.unit.data.test_sources import source, zstd

LIMIT = 1_000
SHORT, LONG = "qısa", "u" * LIMIT


def write_kind(folder: Path, kind: str, texts: list[str]) -> Path:
    """Write texts as rows of a file of a kind."""
    file, data = folder / f"a.{kind}", jsonl(*({"text": text} for text in texts)).encode()
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    else:
        write(file, gzip.compress(data) if kind.endswith("gz") else zstd(data) if kind.endswith("zst") else data)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("piece_bytes", [10, 1_010, 500_000])
def test_a_long_document_is_left_out_counted_and_named(
    tmp_path: Path, kind: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    file = write_kind(tmp_path, kind, [SHORT, LONG * 3, SHORT + "2", LONG + "x", SHORT + "3"])
    report = CleaningReport()
    texts = list(read_texts(source(file, max_document_bytes=LIMIT), report=report))
    assert texts == [SHORT, SHORT + "2", SHORT + "3"]
    assert report.documents == 5
    counts = report.to_dict()
    assert counts["filtered"] == {"max_document_bytes": 2}
    assert counts["first_long_document"] == f"{file}:2:1"
    assert CleaningReport.from_state(json.loads(json.dumps(report.to_state()))).to_dict() == counts


def test_a_line_of_the_limit_is_read_and_one_of_a_byte_more_is_not(tmp_path: Path) -> None:
    line = json.dumps({"text": "u" * 20})
    file = write(tmp_path / "a.jsonl", f"{line}\n{line}")
    assert len(list(read_texts(source(file, max_document_bytes=len(line))))) == 2
    assert not list(read_texts(source(file, max_document_bytes=len(line) - 1)))


def test_its_count_stands_beside_those_of_the_filters(tmp_path: Path) -> None:
    file, report = write_kind(tmp_path, "jsonl", [LONG, "x", SHORT]), CleaningReport()
    filters = Filters(min_characters=2, max_characters=500)
    assert list(read_texts(source(file, max_document_bytes=LIMIT, filters=filters), report=report)) == [SHORT]
    assert report.filtered == {"max_document_bytes": 1, "min_characters": 1, "max_characters": 0}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_long_text_file_is_refused(tmp_path: Path, suffix: str) -> None:
    data = LONG.encode() + b"x"
    file = write(tmp_path / f"a.txt{suffix}", {"": data, ".gz": gzip.compress(data), ".zst": zstd(data)}[suffix])
    with pytest.raises(
        RecipeError, match=rf"r.yaml:1:1: .*a.txt{suffix}: a .txt file is one document, and this one is longer than max_doc"
    ):
        list(read_texts(source(file, max_document_bytes=LIMIT)))
    assert len(list(read_texts(source(file, max_document_bytes=LIMIT + 1)))) == 1


def test_a_long_conversation_is_refused_with_its_line(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": LONG}]}
    file = write(tmp_path / "a.jsonl", jsonl(row))
    entry = ConversationSource(path=str(file), split="train", max_document_bytes=LIMIT)
    with pytest.raises(RecipeError, match=r"r.yaml:2:3: .*a.jsonl:1:1: longer than max_document_bytes"):
        read_conversations(DataSource(entry, SourceLocation("r.yaml", 2, 3)))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_SKIPPED_BYTES", 1_000_000)
    bomb = gzip.compress(jsonl({"text": "x"}).encode() + b"\0" * 20_000_000)
    assert len(bomb) < 30_000
    with pytest.raises(RecipeError, match=r"a.jsonl.gz:2: no end of the line within"):
        list(read_texts(source(write(tmp_path / "a.jsonl.gz", bomb), max_document_bytes=LIMIT)))


def test_the_cache_knows_the_limit_and_only_where_it_is_not_the_default(tmp_path: Path) -> None:
    file = write_kind(tmp_path, "jsonl", [SHORT])
    assert "max_document_bytes" not in describe_source(source(file))
    assert describe_source(source(file, max_document_bytes=LIMIT))["max_document_bytes"] == LIMIT


MEASURED = """
import resource, sys
from pathlib import Path
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import read_texts
from azrecipe.errors import RecipeError, SourceLocation
from azrecipe.recipe.types import TextSource
import pyarrow
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    texts = list(read_texts(DataSource(TextSource(sys.argv[1], "train", max_document_bytes=1 << 20), SourceLocation("r", 1, 1))))
    print(len(texts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
except RecipeError as error:
    print(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt.gz"])
def test_memory_does_not_grow_with_a_bomb(tmp_path: Path, kind: str) -> None:
    """One line of 150 MB, between two short ones."""
    file = tmp_path / f"bomb.{kind}"
    short, zeros = jsonl({"text": "x"}).encode(), b" " * (1 << 20)
    if kind.endswith("zst"):
        import pyarrow

        with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
            for block in (short, *[zeros] * 150, b"\n", short):
                stream.write(block)
    else:
        with gzip.open(file, "wb", compresslevel=1) if kind.endswith("gz") else file.open("wb") as stream:
            for block in (short, *[zeros] * 150, b"\n", short):
                stream.write(block)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(file)], check=True, capture_output=True, text=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == (0 if kind.startswith("txt") else 2)
    assert kilobytes < 60_000


def test_bad_utf8_in_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [b"good"] * 700 + [b"b\xffd"] + [b"good"]
    array = pyarrow.array(texts, pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), len(texts), array.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: .*a.parquet:701:1: column 'text': not UTF-8 \(byte 0xff at byte 2 of the text\)"):
        list(read_texts(source(tmp_path / "a.parquet")))


def test_prepare_counts_a_long_document(project: Path, cli: Callable[..., Done], llama: Path) -> None:
    write("text.jsonl", jsonl(*({"text": f"{SHORT} {n} " * 20} for n in range(40)), {"text": LONG}))
    write("held.txt", "Salam dünya")
    write(
        "pretrain.yaml",
        f"stage: pretrain\nproject: p\nmodel: {{name_or_path: {llama}}}\n"
        "data: {max_length: 32, datasets: [{path: text.jsonl, max_document_bytes: 1000}], validation: {held: {path: held.txt}}}\n"
        "phases: [{name: a, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]\n"
        "training: {global_batch_size: 1, per_device_train_batch_size: 1, precision: float32}\n",
    )
    done = cli("prepare", "pretrain.yaml")
    assert done.code == 0, done.text
    assert "1 max_document_bytes" in " ".join(done.text.split())
    assert "text.jsonl:41:1" in done.text
