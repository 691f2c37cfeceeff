"""Read the rows of files and hub datasets, each with its location."""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from azrecipe.data import cleaning, quality_filters
from azrecipe.data.cleaning_report import CleaningReport
from azrecipe.data.files import DataFile, list_s3_files
from azrecipe.errors import AzrecipeError, CannotRun, Problem, RecipeError, SourceLocation, did_you_mean, get_first_line
from azrecipe.recipe.types import Source, ValidationSource
from azrecipe.utils.console import format_bytes
from azrecipe.utils.paths import DATA_SUFFIXES, is_local_data, is_s3

Row = dict[str, Any]
PIECE_BYTES = 500_000  # bytes of a file that one process works on at a time
BATCH_ROWS = 256  # rows of Parquet or of the hub
MAX_SKIPPED_BYTES = 16 << 30  # of a line that is too long: a file without ends of lines is refused after that
EXCERPT_BYTES = 1_000  # of a line that is too long

OnLongRow = Callable[[SourceLocation, str], None]  # called with the place and the beginning of a row that is too long


@dataclass(frozen=True)
class DataSource:
    """A dataset entry of the recipe, and its location there."""

    entry: Source
    location: SourceLocation

    def error(self, message: str) -> RecipeError:
        """Build an error at the location of the entry."""
        return RecipeError([Problem(self.location, message)])

    @property
    def is_cleaned(self) -> bool:
        """Whether the source has a clean-up or filters."""
        return isinstance(self.entry, ValidationSource) and (
            cleaning.has_cleaning(self.entry) or quality_filters.get_filters(self.entry) is not None
        )

    def has_report(self, report: CleaningReport) -> bool:
        """Whether the report of this source's clean-up says anything."""
        return self.is_cleaned or bool(report.first_long_document)

    @property
    def in_files(self) -> bool:
        """Whether the source is files, and not a hub dataset."""
        return is_local_data(self.entry.path) or is_s3(self.entry.path)

    @property
    def title(self) -> str:
        """The name of the source in messages and results."""
        parts = [self.entry.path, self.entry.name, None if self.in_files else self.entry.split]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class SourcePiece:
    """A part of a source, small enough to send to another process.

    Attributes:
        origin: The file, or the title of a hub dataset.
        rows_before: The lines or rows before this part.
        data: Bytes of lines or of a text, a pyarrow RecordBatch, or a list of rows.
        size: The bytes of the data.
        kind: jsonl, txt, parquet or rows.
    """

    origin: str
    rows_before: int
    data: Any
    size: int
    kind: str

    def read_rows(self, source: DataSource, text_column: str, on_long_row: OnLongRow | None = None) -> Iterator[tuple[SourceLocation, Row]]:
        """Read the rows, each with its location for errors.

        Rows that are longer than max_document_bytes go to `on_long_row`; without it they are refused.
        """
        on_long_row = on_long_row or partial(_refuse_long_row, source)
        if self.kind == "jsonl":
            yield from _read_json_rows(self, source, on_long_row)
        elif self.kind == "txt":
            lines = [_decode_line(self, number, line, source) for number, line in _split_lines(self)]
            yield SourceLocation(self.origin), {text_column: "\n".join(lines)}
        else:
            limit = source.entry.max_document_bytes
            for location, row in _read_parquet_rows(self, source) if self.kind == "parquet" else _read_listed_rows(self):
                if self.size > limit and (size := measure_text(row)) > limit:
                    on_long_row(location, f"{size:,} bytes: columns {', '.join(row)}")
                else:
                    yield location, row


def read_rows(
    source: DataSource, text_column: str = "text", columns: Sequence[str] | None = None, on_long_row: OnLongRow | None = None
) -> Iterator[tuple[SourceLocation, Row]]:
    """Read every row of a source, with its location for errors.

    Args:
        source: The source.
        text_column: The column for the text of a .txt file, which is one row.
        columns: The columns that are needed; rows of a Parquet file or hub dataset may lack others. None: all.
        on_long_row: Called for rows that are longer than max_document_bytes; None: they are refused.
    """
    for piece in read_pieces(source, columns):
        yield from piece.read_rows(source, text_column, on_long_row)


def read_pieces(source: DataSource, columns: Sequence[str] | None = None) -> Iterator[SourcePiece]:
    """Read a source in parts, in order.

    The same content gives the same parts.
    """
    if not source.in_files:
        yield from _read_hub_pieces(source, columns)
        return
    for file in list_files(source):
        try:
            yield from _read_parquet_pieces(file, source, columns) if file.format == "parquet" else _read_byte_pieces(file, source)
        except MemoryError as error:
            raise explain_memory(f"{source.location}: {file}", error) from None


def explain_memory(place: str, error: MemoryError) -> CannotRun:
    """Build the error for text that does not fit into main memory."""
    return CannotRun(
        f"{place}: out of main memory while this text was read or tokenised ({get_first_line(error)}): lower max_document_bytes, or use a "
        "machine with more memory"
    )


def list_files(source: DataSource) -> list[DataFile]:
    """List the files of a source, sorted.

    Its path is a file, a folder or a glob, local or on S3.
    """
    path = source.entry.path
    if source.entry.split != "train":
        raise source.error(f"a {'local file' if is_local_data(path) else 'file'} has no split '{source.entry.split}': leave split out")
    if is_s3(path):
        files = list_s3_files(path, source.location)
    else:
        files = [DataFile(str(file)) for file in _list_local_files(source, path)]
    for file in files:
        if not file.base_name.endswith(DATA_SUFFIXES):
            raise source.error(f"{file}: this kind of file cannot be read. Known: {', '.join(DATA_SUFFIXES)}")
    return files


def _list_local_files(source: DataSource, path: str) -> list[Path]:
    matched = sorted(Path(p) for p in glob.glob(path, recursive=True))
    if len(matched) == 1 and matched[0].is_dir():
        matched = sorted(p for p in matched[0].rglob("*") if p.name.endswith(DATA_SUFFIXES))
        if not matched:
            raise source.error(f"{path}: no file in this folder ends in {', '.join(DATA_SUFFIXES)}")
    matched = [file for file in matched if not file.is_dir()]
    if not matched:
        parent = Path(path).parent
        suggestion = did_you_mean(Path(path).name, (p.name for p in parent.iterdir())) if parent.is_dir() else ""
        raise source.error(f"no such file: {path}{suggestion}")
    for file in matched:
        if file.name.endswith(DATA_SUFFIXES) and not file.is_file():
            raise source.error(f"{file}: {'a link to a file that does not exist' if file.is_symlink() else 'not a regular file'}")
    return matched


def _read_byte_pieces(file: DataFile, source: DataSource) -> Iterator[SourcePiece]:
    """Read JSON in blocks of whole lines, text in one block.

    However much a file decompresses to, no more than max_document_bytes and a block of it are in memory.
    """
    rows_before, limit = 0, source.entry.max_document_bytes
    try:
        with file.open() as stream:
            if file.format == "txt" and (block := stream.read(limit + 1)):
                if len(block) > limit:
                    raise source.error(
                        f"{file}: a .txt file is one document, and this one is longer than max_document_bytes ({format_bytes(limit)}): "
                        "write its documents as lines of JSON, or raise max_document_bytes"
                    )
                yield SourcePiece(file.path, 0, block, len(block), "txt")
            while file.format == "jsonl" and (block := stream.read(PIECE_BYTES)):
                line_start = block.rfind(b"\n") + 1
                try:
                    block += _read_line(stream, limit + 1 - (len(block) - line_start))
                except _EndlessLineError:
                    number = rows_before + block.count(b"\n") + 1
                    message = f"{file}:{number}: no end of the line within {format_bytes(MAX_SKIPPED_BYTES)}: these are no lines of JSON"
                    raise source.error(message) from None
                yield SourcePiece(file.path, rows_before, block, len(block), file.format)
                rows_before += block.count(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise file.explain_read_error(error, source.location) from None


class _EndlessLineError(Exception):
    """A line goes on beyond MAX_SKIPPED_BYTES."""


def _read_line(stream: IO[bytes], size: int) -> bytes:
    """Read the rest of a line, at most `size` bytes of it.

    What follows in the line is skipped. A reader knows a line that was cut by its length.
    """
    line = stream.readline(max(size, 0))
    if line.endswith(b"\n") or len(line) < size:
        return line
    skipped = 0
    while rest := stream.readline(PIECE_BYTES):
        if rest.endswith(b"\n"):
            return line + b"\n"
        skipped += len(rest)
        if skipped > MAX_SKIPPED_BYTES:
            raise _EndlessLineError
    return line


def _split_lines(piece: SourcePiece) -> Iterator[tuple[int, bytes]]:
    """Split a piece into lines, numbered as in its file."""
    lines = piece.data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    yield from enumerate(lines, piece.rows_before + 1)


def _decode_line(piece: SourcePiece, number: int, line: bytes, source: DataSource) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"
        raise source.error(f"{piece.origin}:{number}: not UTF-8 ({byte})") from None


def _refuse_long_row(source: DataSource, location: SourceLocation, _excerpt: str) -> None:
    limit = format_bytes(source.entry.max_document_bytes)
    raise source.error(f"{location}: longer than max_document_bytes ({limit}): remove it, or raise max_document_bytes")


def _read_json_rows(piece: SourcePiece, source: DataSource, on_long_row: OnLongRow) -> Iterator[tuple[SourceLocation, Row]]:
    for number, content in _split_lines(piece):
        location = SourceLocation(piece.origin, number, 1)
        if len(content) > source.entry.max_document_bytes:
            on_long_row(location, content[:EXCERPT_BYTES].decode(errors="replace"))
            continue
        line = _decode_line(piece, number, content, source)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise source.error(f"{location}: not a line of JSON: {error}") from None
        if not isinstance(row, dict):
            raise source.error(f"{location}: a line must be a JSON object, not {type(row).__name__}")
        if "\\u" in line and not _has_no_surrogates(row):
            raise source.error(f"{location}: half a character: an escape from \\ud800 to \\udfff without the other of its pair")
        yield location, row


def _has_no_surrogates(row: Row) -> bool:
    """Whether a row has no lone surrogates, which JSON's escapes can spell."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_listed_rows(piece: SourcePiece) -> Iterator[tuple[SourceLocation, Row]]:
    for number, row in enumerate(piece.data, piece.rows_before + 1):
        yield SourceLocation(f"{piece.origin} row {number}"), row


def _read_parquet_rows(piece: SourcePiece, source: DataSource) -> Iterator[tuple[SourceLocation, Row]]:
    """Read the rows of a batch; refuse texts that are not UTF-8."""
    columns = list(zip(piece.data.schema.names, piece.data.columns, strict=True))
    for i in range(piece.data.num_rows):
        location = SourceLocation(piece.origin, piece.rows_before + i + 1, 1)
        row = {}
        for name, column in columns:
            try:
                row[name] = column[i].as_py()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the text"
                raise source.error(f"{location}: column '{name}': not UTF-8 ({byte})") from None
        yield location, row


def measure_text(value: Any) -> int:
    """Measure the UTF-8 bytes of all texts within a value."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if isinstance(value, dict):
        return sum(map(measure_text, value.values()))
    return sum(map(measure_text, value)) if isinstance(value, list | tuple) else 0


def _read_parquet_pieces(file: DataFile, source: DataSource, columns: Sequence[str] | None) -> Iterator[SourcePiece]:
    import pyarrow
    import pyarrow.parquet

    rows_before = 0
    try:
        with pyarrow.parquet.ParquetFile(file.open_raw()) as parquet:
            present = list(columns) if columns and set(columns) <= set(parquet.schema_arrow.names) else None
            batch_rows = _choose_batch_rows(parquet.metadata, source.entry.max_document_bytes)
            for batch in parquet.iter_batches(batch_size=batch_rows, columns=present):
                yield SourcePiece(file.path, rows_before, batch, batch.nbytes, "parquet")
                rows_before += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        if "AWS Error" in str(error):
            raise file.explain_read_error(error, source.location) from None
        raise source.error(f"{file}: not a Parquet file that can be read: {error}") from None


def _choose_batch_rows(metadata: Any, limit: int) -> int:
    """Choose the rows of a batch: few where they are long."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=0.0)
    return max(1, min(BATCH_ROWS, int(4 * limit / max(row_bytes, 1))))


def _read_hub_pieces(source: DataSource, columns: Sequence[str] | None) -> Iterator[SourcePiece]:
    import datasets

    entry = source.entry
    datasets.disable_progress_bars()
    streaming = "[" not in entry.split  # a slice like train[:2000] cannot be streamed
    try:
        table = datasets.load_dataset(
            entry.path, entry.name, split=entry.split, data_files=entry.data_files, revision=entry.revision, streaming=streaming
        )
        rows_before, rows = 0, list[Row]()
        for row in table:
            rows.append({key: row[key] for key in columns} if columns and set(columns) <= row.keys() else row)
            if len(rows) == BATCH_ROWS:
                yield _build_row_piece(source, rows_before, rows)
                rows_before, rows = rows_before + BATCH_ROWS, []
        if rows:
            yield _build_row_piece(source, rows_before, rows)
    except (MemoryError, AzrecipeError):
        raise
    except Exception as error:  # the hub's client raises the errors of its HTTP library
        raise CannotRun(
            f"{source.location}: the dataset {source.title} cannot be opened: {get_first_line(error)}\n"
            "  This needs the network (and, for a gated dataset, its licence accepted and `hf auth login`). "
            "Without a network, use local files: path: ./my_text.jsonl"
        ) from None


def _build_row_piece(source: DataSource, rows_before: int, rows: list[Row]) -> SourcePiece:
    return SourcePiece(source.title, rows_before, rows, measure_text(rows), "rows")
