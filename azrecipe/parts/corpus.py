"""Where documents come from: local files and hub datasets, read one by one and cleaned, each complaint at its place."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from azrecipe.errors import CannotRun, Place, Problem, RecipeError, did_you_mean, hint
from azrecipe.parts import writing
from azrecipe.parts.files import sha256
from azrecipe.parts.writing import Cleaner, Tally
from azrecipe.recipe.load import DATA_SUFFIXES, is_local_data
from azrecipe.recipe.types import HeldOut, Source, TextSource, ValidationSource

Row = dict[str, Any]


@dataclass(frozen=True)
class Located:
    """A dataset entry and where the recipe wrote it."""

    source: Source
    place: Place

    def wrong(self, message: str) -> RecipeError:
        return RecipeError([Problem(self.place, message)])

    @property
    def cleaned(self) -> bool:
        """Whether the source has a clean-up."""
        return isinstance(self.source, ValidationSource) and writing.asks(self.source)

    @property
    def title(self) -> str:
        """How messages and results call the source."""
        parts = [self.source.path, self.source.name, self.source.split if not is_local_data(self.source.path) else None]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Document:
    """A text and what it belongs together with: the value of held_out's `by` column, else its own number in the source."""

    text: str
    group: str


def texts(located: Located, held_out_side: bool = False, tally: Tally | None = None) -> Iterator[str]:
    """The text of `documents`."""
    return (document.text for document in documents(located, held_out_side, tally))


def documents(located: Located, held_out_side: bool = False, tally: Tally | None = None) -> Iterator[Document]:
    """The source's documents, cleaned as it asks, in its own order, up to its max_bytes. Those without text are left out.

    `held_out_side` chooses which documents of a source with `held_out` are meant: those held out, or the others.
    `tally` counts what was read on that side and what its clean-up did.
    Raises RecipeError for a file that is missing, not UTF-8 or lacks the column, CannotRun for the hub.
    """
    source = located.source
    assert isinstance(source, ValidationSource)
    clean, tally = Cleaner(source), tally or Tally()
    total = 0
    for number, (where, row) in enumerate(rows(located, text_column=source.text_column)):
        text = _column(row, source.text_column, "text_column", where, located)
        if not isinstance(text, str):
            raise located.wrong(f"{where}: column '{source.text_column}' holds {type(text).__name__}, not text")
        if not text.strip():
            continue
        group = str(number)
        if source.held_out is not None:
            if source.held_out.by is not None:
                group = str(_column(row, source.held_out.by, "held_out.by", where, located))
            # by the text as it came: a document keeps its side when the clean-up changes
            if is_held_out(text if source.held_out.by is None else group, source.held_out) != held_out_side:
                continue
        text = clean(text, tally)
        if not text:
            continue
        yield Document(text, group)
        total += len(text.encode())
        if source.max_bytes is not None and total >= source.max_bytes:
            return


def is_held_out(key: str, held_out: HeldOut) -> bool:
    """Whether a document, or the group it belongs to, is on the held-out side: a hash against the fraction."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out.fraction * 2**64


def _column(row: Row, column: str, key: str, where: Place, located: Located) -> Any:
    if column not in row:
        raise located.wrong(f"{where}: no column '{column}'{hint(column, row, 'Columns')} (recipe key {key})")
    return row[column]


def rows(located: Located, text_column: str = "text") -> Iterator[tuple[Place, Row]]:
    """Every row of a source with the place to name in a complaint. A .txt file is one row, its text in `text_column`."""
    if not is_local_data(located.source.path):
        yield from _hub_rows(located)
        return
    for file in files(located):
        if file.name.endswith((".txt", ".txt.gz")):
            yield Place(str(file)), {text_column: "\n".join(line for _, line in _lines(file, located))}
        elif file.name.endswith(".parquet"):
            yield from _parquet_rows(file, located)
        else:
            yield from _json_rows(file, located)


def files(located: Located) -> list[Path]:
    """The local files that a source's path (a file, a folder or a glob) names, sorted."""
    path = located.source.path
    if located.source.split != "train":
        raise located.wrong(f"a local file has no split '{located.source.split}': leave split out")
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
        if not file.name.endswith(DATA_SUFFIXES):
            raise located.wrong(f"{file}: not a kind of file that can be read. Known: {', '.join(DATA_SUFFIXES)}")
        if not file.is_file():
            raise located.wrong(f"{file}: {'a link to a file that is gone' if file.is_symlink() else 'not a regular file'}")
    return matched


def _lines(file: Path, located: Located) -> Iterator[tuple[int, str]]:
    opener: Callable[[Path], IO[bytes]] = gzip.open if file.suffix == ".gz" else open  # type: ignore[assignment]
    number = 0
    try:
        with opener(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise located.wrong(
            f"{file}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise located.wrong(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json_rows(file: Path, located: Located) -> Iterator[tuple[Place, Row]]:
    for number, line in _lines(file, located):
        if not line.strip():
            continue
        where = Place(str(file), number, 1)
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


def _parquet_rows(file: Path, located: Located) -> Iterator[tuple[Place, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(file), number, 1), row
    except (pyarrow.ArrowException, OSError) as error:
        raise located.wrong(f"{file}: not a Parquet file that can be read: {error}") from None


def _hub_rows(located: Located) -> Iterator[tuple[Place, Row]]:
    import datasets

    source = located.source
    datasets.disable_progress_bars()
    streaming = "[" not in source.split  # a slice like train[:2000] cannot be streamed
    try:
        table = datasets.load_dataset(
            source.path, source.name, split=source.split, data_files=source.data_files, revision=source.revision, streaming=streaming
        )
        for number, row in enumerate(table, 1):
            yield Place(f"{located.title} row {number}"), row
    except MemoryError:
        raise
    except Exception as error:  # the hub's client raises those of whichever HTTP library it is built on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CannotRun(
            f"{located.place}: the dataset {located.title} cannot be opened: {reason}\n"
            "  It needs the network (and for a gated dataset its licence accepted and `hf auth login`). "
            "Without a network give local files: path: ./my_text.jsonl"
        ) from None


def identity(located: Located) -> dict[str, Any]:
    """What a source is, for a cache key: a local file's content, a hub dataset's name and revision; and what is taken of it."""
    source = located.source
    assert isinstance(source, ValidationSource)
    if is_local_data(source.path):
        origin: Any = [sha256(file) for file in files(located)]
    else:
        origin = [source.path, source.name, source.split, source.data_files, source.revision]
    held_out = source.held_out and [source.held_out.fraction, source.held_out.by]
    found = {"origin": origin, "column": source.text_column, "max_bytes": source.max_bytes, "held_out": held_out}
    return found | ({"clean_up": clean_up} if (clean_up := writing.identity(source)) else {})


def mixed(sources: list[Located], max_bytes: int | None, tallies: Sequence[Tally] | None = None) -> Iterator[tuple[int, str]]:
    """Documents of several sources by weight, for one pass: always from the source that is furthest behind its share.

    Yields (index of the source, text). Without `max_bytes` it ends when the first source runs out, so that the shares
    hold; with it, a source that runs out is gone through once and the others go on until so many bytes. `tallies` are the
    sources' own, for what their clean-up does.
    """
    open_sources = {i: texts(source, tally=tallies[i] if tallies else None) for i, source in enumerate(sources)}
    weights = [s.source.weight for s in sources if isinstance(s.source, TextSource)]
    given = [0.0] * len(sources)
    total = 0
    while open_sources and (max_bytes is None or total < max_bytes):
        i = min(open_sources, key=lambda j: (given[j] / weights[j], j))
        text = next(open_sources[i], None)
        if text is None:
            if max_bytes is None:
                return
            del open_sources[i]
            continue
        size = len(text.encode())
        given[i] += size
        total += size
        yield i, text
