"""Rows of files and hub datasets, read one by one, each with its place."""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.data import cleaning, quality_filters
from azrecipe.data.files import File, on_s3
from azrecipe.errors import AzrecipeError, CannotRun, Place, Problem, RecipeError, did_you_mean
from azrecipe.recipe.types import Source, ValidationSource
from azrecipe.utils.paths import DATA_SUFFIXES, is_local_data, is_s3

Row = dict[str, Any]
PIECE = 500_000  # bytes of a file that are read, and worked on, at a time
BATCH = 256  # rows of Parquet or of the hub


@dataclass(frozen=True)
class Located:
    """A dataset entry and where the recipe wrote it."""

    source: Source
    place: Place

    def wrong(self, message: str) -> RecipeError:
        return RecipeError([Problem(self.place, message)])

    @property
    def cleaned(self) -> bool:
        """Whether the source has a clean-up or filters."""
        return isinstance(self.source, ValidationSource) and (cleaning.asks(self.source) or quality_filters.of(self.source) is not None)

    @property
    def in_files(self) -> bool:
        """Whether the source is files, here or on S3, and no dataset on the hub."""
        return is_local_data(self.source.path) or is_s3(self.source.path)

    @property
    def title(self) -> str:
        """How messages and results call the source."""
        parts = [self.source.path, self.source.name, None if self.in_files else self.source.split]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Piece:
    """A part of a source as it was read, small enough to hand to another process: lines of JSON, a whole text, or rows.

    `before`: the lines or rows of the file before it. `data`: bytes of lines or of a text, a pyarrow RecordBatch, or rows.
    """

    origin: str
    before: int
    data: Any
    size: int
    kind: str

    def rows(self, located: Located, text_column: str) -> Iterator[tuple[Place, Row]]:
        """Its rows, each with the place to name in a complaint."""
        if self.kind == "jsonl":
            yield from _json_rows(self, located)
        elif self.kind == "txt":
            lines = [line for _, line in _lines(self, located)]
            yield Place(self.origin), {text_column: "\n".join(lines)}
        elif self.kind == "parquet":
            for number, row in enumerate(self.data.to_pylist(), self.before + 1):
                yield Place(self.origin, number, 1), row
        else:
            for number, row in enumerate(self.data, self.before + 1):
                yield Place(f"{self.origin} row {number}"), row


def rows(located: Located, text_column: str = "text", columns: Sequence[str] | None = None) -> Iterator[tuple[Place, Row]]:
    """Every row of a source with the place to name in a complaint. A .txt file is one row, its text in `text_column`.

    `columns` are those that will be looked at; the others of a Parquet file or hub dataset may be missing from the rows.
    """
    for piece in pieces(located, columns):
        yield from piece.rows(located, text_column)


def pieces(located: Located, columns: Sequence[str] | None = None) -> Iterator[Piece]:
    """The source in parts, in order; the same parts each time, as long as its content is the same."""
    if not located.in_files:
        yield from _hub_pieces(located, columns)
        return
    for file in files(located):
        yield from _parquet_pieces(file, located, columns) if file.kind == "parquet" else _byte_pieces(file, located)


def files(located: Located) -> list[File]:
    """The files that a source's path (a file, a folder or a glob, here or on S3) names, sorted."""
    path = located.source.path
    if located.source.split != "train":
        raise located.wrong(f"a {'local file' if is_local_data(path) else 'file'} has no split '{located.source.split}': leave split out")
    if is_s3(path):
        found = on_s3(path, located.place)
    else:
        found = [File(str(file)) for file in _local_files(located, path)]
    for file in found:
        if not file.name.endswith(DATA_SUFFIXES):
            raise located.wrong(f"{file}: not a kind of file that can be read. Known: {', '.join(DATA_SUFFIXES)}")
    return found


def _local_files(located: Located, path: str) -> list[Path]:
    matched = sorted(Path(p) for p in glob.glob(path, recursive=True))
    if len(matched) == 1 and matched[0].is_dir():
        matched = sorted(p for p in matched[0].rglob("*") if p.name.endswith(DATA_SUFFIXES))
        if not matched:
            raise located.wrong(f"{path}: no file in this folder ends in {', '.join(DATA_SUFFIXES)}")
    matched = [file for file in matched if not file.is_dir()]
    if not matched:
        parent = Path(path).parent
        near = did_you_mean(Path(path).name, (p.name for p in parent.iterdir())) if parent.is_dir() else ""
        raise located.wrong(f"no such file: {path}{near}")
    for file in matched:
        if file.name.endswith(DATA_SUFFIXES) and not file.is_file():
            raise located.wrong(f"{file}: {'a link to a file that is gone' if file.is_symlink() else 'not a regular file'}")
    return matched


def _byte_pieces(file: File, located: Located) -> Iterator[Piece]:
    """A file of lines in blocks of whole lines; a text file in one."""
    before = 0
    try:
        with file.open() as stream:
            while block := stream.read(PIECE if file.kind == "jsonl" else -1):
                block += stream.readline() if file.kind == "jsonl" else b""
                yield Piece(file.path, before, block, len(block), file.kind)
                before += block.count(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise file.cannot_be_read(error, located.place) from None


def _lines(piece: Piece, located: Located) -> Iterator[tuple[int, str]]:
    """The lines of a piece, numbered as in its file."""
    lines = piece.data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, piece.before + 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"
            raise located.wrong(f"{piece.origin}:{number}: not UTF-8 ({byte})") from None


def _json_rows(piece: Piece, located: Located) -> Iterator[tuple[Place, Row]]:
    for number, line in _lines(piece, located):
        if not line.strip():
            continue
        where = Place(piece.origin, number, 1)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise located.wrong(f"{where}: not a line of JSON: {error}") from None
        if not isinstance(row, dict):
            raise located.wrong(f"{where}: a line must be a JSON object, not {type(row).__name__}")
        if "\\u" in line and not _whole_characters(row):
            raise located.wrong(f"{where}: half a character: an escape from \\ud800 to \\udfff without the other of its pair")
        yield where, row


def _whole_characters(row: Row) -> bool:
    """Whether a row's text is Unicode: JSON's escapes can spell a surrogate that stands alone."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_pieces(file: File, located: Located, columns: Sequence[str] | None) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.raw()) as parquet:
            wanted = list(columns) if columns and set(columns) <= set(parquet.schema_arrow.names) else None
            for batch in parquet.iter_batches(batch_size=BATCH, columns=wanted):
                yield Piece(file.path, number, batch, batch.nbytes, "parquet")
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        if "AWS Error" in str(error):
            raise file.cannot_be_read(error, located.place) from None
        raise located.wrong(f"{file}: not a Parquet file that can be read: {error}") from None


def _hub_pieces(located: Located, columns: Sequence[str] | None) -> Iterator[Piece]:
    import datasets

    source = located.source
    datasets.disable_progress_bars()
    streaming = "[" not in source.split  # a slice like train[:2000] cannot be streamed
    try:
        table = datasets.load_dataset(
            source.path, source.name, split=source.split, data_files=source.data_files, revision=source.revision, streaming=streaming
        )
        number, held = 0, list[Row]()
        for row in table:
            held.append({key: row[key] for key in columns} if columns and set(columns) <= row.keys() else row)
            if len(held) == BATCH:
                yield _of_rows(located, number, held)
                number, held = number + BATCH, []
        if held:
            yield _of_rows(located, number, held)
    except (MemoryError, AzrecipeError):
        raise
    except Exception as error:  # the hub's client raises those of whichever HTTP library it is built on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CannotRun(
            f"{located.place}: the dataset {located.title} cannot be opened: {reason}\n"
            "  It needs the network (and for a gated dataset its licence accepted and `hf auth login`). "
            "Without a network give local files: path: ./my_text.jsonl"
        ) from None


def _of_rows(located: Located, number: int, held: list[Row]) -> Piece:
    size = sum(len(value) for row in held for value in row.values() if isinstance(value, str))
    return Piece(located.title, number, held, size, "rows")
