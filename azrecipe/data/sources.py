"""Read the documents of sources: cleaned, filtered and mixed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from azrecipe.data import cleaning, quality_filters
from azrecipe.data.cleaning import TextCleaner
from azrecipe.data.cleaning_report import LONG_DOCUMENT, CleaningReport
from azrecipe.data.readers import DataSource, Row, list_files, read_rows
from azrecipe.errors import SourceLocation, suggest_choices
from azrecipe.recipe.types import HeldOut, TextSource, ValidationSource
from azrecipe.recipe.types.data import MAX_DOCUMENT_BYTES
from azrecipe.utils.console import format_bytes, print_progress


@dataclass(frozen=True)
class Document:
    """A text with its group.

    Attributes:
        text: The text after its clean-up.
        group: What the document belongs to: the value of held_out's `by` column, else its number in the source.
        raw_hash: The `hash_text` of the text before its clean-up.
        location: The file and line or row that it is from.
    """

    text: str
    group: str
    raw_hash: bytes
    location: SourceLocation


def hash_text(text: str) -> bytes:
    """Hash a text, to tell whether two are the same."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def read_texts(source: DataSource, held_out_side: bool = False, report: CleaningReport | None = None) -> Iterator[str]:
    """Read the texts of `read_documents`."""
    return (document.text for document in read_documents(source, held_out_side, report))


def read_first_text(source: DataSource) -> str:
    """Read the first text of a source. Raises RecipeError where there is none."""
    text = next(read_texts(source), None)
    if text is None:
        raise source.error(f"{source.title} holds no text")
    return text


def read_documents(source: DataSource, held_out_side: bool = False, report: CleaningReport | None = None) -> Iterator[Document]:
    """Read the documents of a source, in order, up to its max_bytes.

    They are cleaned and filtered as the source says. Documents without text are left out.

    Args:
        source: The source.
        held_out_side: Whether to read the held-out documents of a source with `held_out`, or the others.
        report: Counts what is read on that side, and what its clean-up and filters do. Rows that are longer than
            max_document_bytes have no side: they count on both.

    Raises:
        RecipeError: A file is missing, not UTF-8 or lacks the column.
        CannotRun: The hub or S3 cannot be read.
    """
    reader, report = DocumentReader(source), report or CleaningReport()
    rows = read_rows(source, reader.entry.text_column, reader.columns, partial(record_long_row, report))
    documents = reader.read_documents(rows, report, held_out_side)
    return limit_bytes(documents, reader.entry.max_bytes)


def record_long_row(report: CleaningReport, location: SourceLocation, excerpt: str) -> None:
    """Record a row that is longer than max_document_bytes."""
    report.record_long_document(str(location), excerpt)


def announce_long_documents(source: DataSource, report: CleaningReport) -> None:
    """Say how many documents max_document_bytes left out, if any."""
    if report.first_long_document:
        count, limit = report.filtered[LONG_DOCUMENT], format_bytes(source.entry.max_document_bytes)
        print_progress(
            f"  {source.title}: left out because they are longer than max_document_bytes ({limit}): {count:,} of {report.documents:,} documents; "
            f"the first: {report.first_long_document}",
            os.environ.get("RANK", "0") == "0",
        )


def limit_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Yield documents up to the one that reaches `max_bytes` of text."""
    total = 0
    for document in documents:
        yield document
        if max_bytes is not None:
            total += len(document.text.encode())
            if total >= max_bytes:
                return


class DocumentReader:
    """Turns rows of one source into documents; the same in every process."""

    def __init__(self, source: DataSource) -> None:
        assert isinstance(source.entry, ValidationSource)
        self.source, self.entry = source, source.entry
        self.cleaner = TextCleaner(self.entry)
        settings = quality_filters.get_filters(self.entry)
        self.quality_filter = quality_filters.QualityFilter(settings) if settings else None
        by = self.entry.held_out.by if self.entry.held_out else None
        self.columns = [self.entry.text_column, *([by] if by else [])]

    def read_documents(
        self, rows: Iterable[tuple[SourceLocation, Row]], report: CleaningReport, held_out_side: bool = False
    ) -> Iterator[Document]:
        """Read the documents of one side that are not dropped."""
        column, held_out = self.entry.text_column, self.entry.held_out
        for number, (location, row) in enumerate(rows):
            text = _get_column(row, column, "text_column", location, self.source)
            if not isinstance(text, str):
                raise self.source.error(f"{location}: column '{column}' holds {type(text).__name__}, not text")
            if not text.strip():
                continue
            group = str(number)
            if held_out is not None:
                if held_out.by is not None:
                    group = str(_get_column(row, held_out.by, "held_out.by", location, self.source))
                # By the raw text: a document keeps its side when the clean-up changes
                if is_held_out(text if held_out.by is None else group, held_out) != held_out_side:
                    continue
            cleaned = self.cleaner(text, report)
            if cleaned and (self.quality_filter is None or self.quality_filter(cleaned, report)):
                yield Document(cleaned, group, hash_text(text), location)


def is_held_out(key: str, held_out: HeldOut) -> bool:
    """Whether a document, or its group, is on the held-out side."""
    return is_below_fraction(hashlib.sha256(key.encode()).digest(), held_out.fraction)


def is_below_fraction(digest: bytes, fraction: float) -> bool:
    """Whether a hash, as a number from 0 to 1, is below."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _get_column(row: Row, column: str, key: str, location: SourceLocation, source: DataSource) -> Any:
    if column not in row:
        raise source.error(f"{location}: no column '{column}'{suggest_choices(column, row, 'Columns')} (recipe key {key})")
    return row[column]


def describe_source(source: DataSource) -> dict[str, Any]:
    """Describe what is read of a source, for a cache key.

    A local file is described by its content, one on S3 by its path, size and time of modification, and a hub dataset by its
    name and revision.
    """
    entry = source.entry
    assert isinstance(entry, ValidationSource)
    if source.in_files:
        origin: Any = [file.content_id for file in list_files(source)]
    else:
        origin = [entry.path, entry.name, entry.split, entry.data_files, entry.revision]
    held_out = entry.held_out and [entry.held_out.fraction, entry.held_out.by]
    description = {"origin": origin, "column": entry.text_column, "max_bytes": entry.max_bytes, "held_out": held_out}
    if entry.max_document_bytes != MAX_DOCUMENT_BYTES:  # the default is left out, so that caches of earlier versions stay valid
        description["max_document_bytes"] = entry.max_document_bytes
    description |= {"clean_up": clean_up} if (clean_up := cleaning.describe_cleaning(entry)) else {}
    return description | ({"filters": filters} if (filters := quality_filters.describe_filters(entry)) else {})


def mix_documents(
    sources: Sequence[DataSource], max_bytes: int | None, reports: Sequence[CleaningReport] | None = None
) -> Iterator[tuple[int, str]]:
    """Mix the documents of several sources by weight, in one pass.

    The next document is always of the source that is furthest behind its share.

    Args:
        sources: The sources.
        max_bytes: Where the mixture ends; a source that runs out before leaves it. None: the mixture ends when the first
            source runs out, so that the shares hold.
        reports: A report for each source, of what its clean-up does.

    Yields:
        The index of the source, and the text.
    """
    open_sources = {i: read_texts(source, report=reports[i] if reports else None) for i, source in enumerate(sources)}
    weights = [s.entry.weight for s in sources if isinstance(s.entry, TextSource)]
    bytes_read = [0.0] * len(sources)
    total = 0
    while open_sources and (max_bytes is None or total < max_bytes):
        i = find_furthest_behind(open_sources, bytes_read, weights)
        text = next(open_sources[i], None)
        if text is None:
            if max_bytes is None:
                return
            del open_sources[i]
            continue
        size = len(text.encode())
        bytes_read[i] += size
        total += size
        yield i, text


def find_furthest_behind(candidates: Iterable[int], bytes_read: Mapping[int, float] | Sequence[float], weights: Sequence[float]) -> int:
    """Find the source, of some candidates, that is furthest behind its share."""
    return min(candidates, key=lambda i: (bytes_read[i] / weights[i], i))
