"""Tell the script of each character, and filter text by script."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import regex

from azrecipe.recipe.schema import load_schema
from azrecipe.recipe.types import Scripts

Codes = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.uint8]

SCRIPT_NAMES: tuple[str, ...] = tuple(load_schema("common")["$defs"]["script"]["enum"])  # the id of a script is its position here, from 1
OTHER_SCRIPT = 254  # a letter of a script younger than NAMES
COMBINING_MARK = 255
LATIN, CYRILLIC = SCRIPT_NAMES.index("Latin") + 1, SCRIPT_NAMES.index("Cyrillic") + 1


def to_code_points(text: str) -> Codes:
    """Convert a text to its code points, [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@cache
def build_script_table() -> Ids:
    """Build the table of scripts, [code points].

    This takes about a quarter of a second. A letter (Unicode's L) has the id of its script, or OTHER_SCRIPT; letters of no single script (ʻ, ª) have 0. A mark has
    COMBINING_MARK. All else has 0.
    """
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    table = np.zeros(0x110000, np.uint8)
    letters = "".join(regex.findall(r"\p{L}+", characters))
    letter_codes = to_code_points(letters)
    table[letter_codes] = OTHER_SCRIPT
    for i, name in enumerate(("Common", "Inherited", *SCRIPT_NAMES), -1):
        for match in regex.finditer(rf"\p{{Script={name}}}+", letters):
            table[letter_codes[match.start() : match.end()]] = max(i, 0)
    table[to_code_points("".join(regex.findall(r"\p{M}+", characters)))] = COMBINING_MARK
    return table


def compute_script_shares(text: str) -> dict[str, float]:
    """Compute each script's share of a text's letters, the largest first."""
    counts = np.bincount(build_script_table()[to_code_points(text)], minlength=256)[1:COMBINING_MARK]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return {SCRIPT_NAMES[i] if i < len(SCRIPT_NAMES) else "other": round(float(counts[i] / counts.sum()), 3) for i in order}


@dataclass(frozen=True)
class ScriptFilterResult:
    """What a script filter keeps of a document, and what it drops.

    Attributes:
        text: The text that is kept; empty where nothing is.
        document_dropped: Whether the whole document was dropped.
        dropped_lines: The lines that were dropped.
    """

    text: str
    document_dropped: bool = False
    dropped_lines: tuple[str, ...] = ()


class ScriptFilter:
    """A filter for documents or lines in allowed scripts."""

    def __init__(self, settings: Scripts) -> None:
        self.min_share, self.by_line = settings.min_share, settings.unit == "line"
        self.latin = "Latin" in settings.allow
        self.letters = (build_script_table() > 0) & (build_script_table() < COMBINING_MARK)
        self.allowed = np.isin(build_script_table(), [SCRIPT_NAMES.index(name) + 1 for name in settings.allow])

    def __call__(self, text: str) -> ScriptFilterResult:
        """Filter a document; the text is empty where nothing is left."""
        if self.latin and text.isascii():
            return ScriptFilterResult(text)
        return self._filter_lines(text) if self.by_line else self._filter_document(text)

    def _filter_document(self, text: str) -> ScriptFilterResult:
        codes = to_code_points(text)
        letters = np.count_nonzero(self.letters[codes])
        enough = not letters or np.count_nonzero(self.allowed[codes]) / letters >= self.min_share
        return ScriptFilterResult(text) if enough else ScriptFilterResult("", document_dropped=True)

    def _filter_lines(self, text: str) -> ScriptFilterResult:
        codes = to_code_points(text)
        starts = np.concatenate(([0], np.flatnonzero(codes == ord("\n")) + 1))
        codes = np.append(codes, ord("\n"))  # so that the last line, which may be empty, is a sum too
        letters = np.add.reduceat(self.letters[codes], starts, dtype=np.int64)
        allowed = np.add.reduceat(self.allowed[codes], starts, dtype=np.int64)
        good = allowed / np.maximum(letters, 1) >= self.min_share
        good |= letters == 0
        if good.all():
            return ScriptFilterResult(text)
        lines = text.split("\n")
        kept_text = "\n".join(line for line, keep in zip(lines, good, strict=True) if keep)
        dropped = tuple(line for line, keep in zip(lines, good, strict=True) if not keep)
        return (
            ScriptFilterResult(kept_text, dropped_lines=dropped)
            if kept_text.strip()
            else ScriptFilterResult("", document_dropped=True, dropped_lines=dropped)
        )
