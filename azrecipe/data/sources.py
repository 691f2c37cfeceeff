"""Where documents come from: files and hub datasets, read one by one and cleaned, each complaint at its place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from azrecipe.data import cleaning, quality_filters
from azrecipe.data.cleaning import Cleaner
from azrecipe.data.cleaning_report import Tally
from azrecipe.data.readers import Located, Row, files, rows
from azrecipe.errors import Place, hint
from azrecipe.recipe.types import HeldOut, TextSource, ValidationSource


@dataclass(frozen=True)
class Document:
    """A text and what it belongs together with: the value of held_out's `by` column, else its own number in the source.

    `came` is the `text_hash` of the text as it came, before its clean-up.
    """

    text: str
    group: str
    came: bytes


def text_hash(text: str) -> bytes:
    """A document's content, for telling whether two are the same."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def texts(located: Located, held_out_side: bool = False, tally: Tally | None = None) -> Iterator[str]:
    """The text of `documents`."""
    return (document.text for document in documents(located, held_out_side, tally))


def documents(located: Located, held_out_side: bool = False, tally: Tally | None = None) -> Iterator[Document]:
    """The source's documents, cleaned and filtered as it asks, in its own order, up to its max_bytes.

    Those without text are left out. `held_out_side` chooses which documents of a source with `held_out` are meant: those
    held out, or the others. `tally` counts what was read on that side and what its clean-up and filters did.
    Raises RecipeError for a file that is missing, not UTF-8 or lacks the column, CannotRun for the hub or S3.
    """
    reader = Reader(located)
    found = reader.read(rows(located, reader.source.text_column, reader.columns), tally or Tally(), held_out_side)
    return until(found, reader.source.max_bytes)


def until(found: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Documents up to the one that reaches so many bytes of text."""
    total = 0
    for document in found:
        yield document
        if max_bytes is not None:
            total += len(document.text.encode())
            if total >= max_bytes:
                return


class Reader:
    """Rows of one source to documents; the same in whichever process."""

    def __init__(self, located: Located) -> None:
        assert isinstance(located.source, ValidationSource)
        self.located, self.source = located, located.source
        self.clean = Cleaner(self.source)
        asked = quality_filters.of(self.source)
        self.filter = quality_filters.Filter(asked) if asked else None
        by = self.source.held_out.by if self.source.held_out else None
        self.columns = [self.source.text_column, *([by] if by else [])]

    def read(self, rows: Iterable[tuple[Place, Row]], tally: Tally, held_out_side: bool = False) -> Iterator[Document]:
        """The documents in the rows that are meant and kept."""
        column, held_out = self.source.text_column, self.source.held_out
        for number, (where, row) in enumerate(rows):
            text = _column(row, column, "text_column", where, self.located)
            if not isinstance(text, str):
                raise self.located.wrong(f"{where}: column '{column}' holds {type(text).__name__}, not text")
            if not text.strip():
                continue
            group = str(number)
            if held_out is not None:
                if held_out.by is not None:
                    group = str(_column(row, held_out.by, "held_out.by", where, self.located))
                # by the text as it came: a document keeps its side when the clean-up changes
                if is_held_out(text if held_out.by is None else group, held_out) != held_out_side:
                    continue
            made = self.clean(text, tally)
            if made and (self.filter is None or self.filter(made, tally)):
                yield Document(made, group, text_hash(text))


def is_held_out(key: str, held_out: HeldOut) -> bool:
    """Whether a document, or the group it belongs to, is on the held-out side: a hash against the fraction."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out.fraction * 2**64


def _column(row: Row, column: str, key: str, where: Place, located: Located) -> Any:
    if column not in row:
        raise located.wrong(f"{where}: no column '{column}'{hint(column, row, 'Columns')} (recipe key {key})")
    return row[column]


def identity(located: Located) -> dict[str, Any]:
    """What a source is, for a cache key, and what is taken of it.

    A local file by its content; one on S3 by its key, size and time of change; a hub dataset by name and revision.
    """
    source = located.source
    assert isinstance(source, ValidationSource)
    if located.in_files:
        origin: Any = [file.version for file in files(located)]
    else:
        origin = [source.path, source.name, source.split, source.data_files, source.revision]
    held_out = source.held_out and [source.held_out.fraction, source.held_out.by]
    found = {"origin": origin, "column": source.text_column, "max_bytes": source.max_bytes, "held_out": held_out}
    found |= {"clean_up": clean_up} if (clean_up := cleaning.identity(source)) else {}
    return found | ({"filters": kept} if (kept := quality_filters.identity(source)) else {})


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
