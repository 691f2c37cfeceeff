"""Which script each character is of, and which documents or lines are in the scripts that a recipe allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import regex

from azrecipe.recipe.schema import document
from azrecipe.recipe.types import Scripts

Codes = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.uint8]

NAMES: tuple[str, ...] = tuple(document("common")["$defs"]["script"]["enum"])  # a script's id is its place here, from 1
OTHER = 254  # a letter of a script younger than NAMES
MARK = 255
LATIN, CYRILLIC = NAMES.index("Latin") + 1, NAMES.index("Cyrillic") + 1


def codes(text: str) -> Codes:
    """The code points of a text, [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@cache
def table() -> Ids:
    """For each code point: the id of its script if it is a letter, MARK if it is a mark, 0 for all else.

    Letters are Unicode's L; those that belong to no one script (ʻ, ª) are 0 as well. About a quarter of a second, once.
    """
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    found = np.zeros(0x110000, np.uint8)
    letters = "".join(regex.findall(r"\p{L}+", every))
    of = codes(letters)
    found[of] = OTHER
    for i, name in enumerate(("Common", "Inherited", *NAMES), -1):
        for match in regex.finditer(rf"\p{{Script={name}}}+", letters):
            found[of[match.start() : match.end()]] = max(i, 0)
    found[codes("".join(regex.findall(r"\p{M}+", every)))] = MARK
    return found


def shares(text: str) -> dict[str, float]:
    """The share of each script among a text's letters, the largest first."""
    counts = np.bincount(table()[codes(text)], minlength=256)[1:MARK]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return {NAMES[i] if i < len(NAMES) else "other": round(float(counts[i] / counts.sum()), 3) for i in order}


@dataclass(frozen=True)
class Kept:
    """What a filter leaves of a text: the text, or nothing; and what it dropped: a whole document or lines."""

    text: str
    document: bool = False
    lines: tuple[str, ...] = ()


class Filter:
    """The documents, or lines, of a source that are in the scripts its recipe allows."""

    def __init__(self, asked: Scripts) -> None:
        self.min_share, self.by_line = asked.min_share, asked.unit == "line"
        self.latin = "Latin" in asked.allow
        self.letters = (table() > 0) & (table() < MARK)
        self.allowed = np.isin(table(), [NAMES.index(name) + 1 for name in asked.allow])

    def __call__(self, text: str) -> Kept:
        """The text without what is not in the allowed scripts; `text` is empty where nothing is left."""
        if self.latin and text.isascii():
            return Kept(text)
        return self._lines(text) if self.by_line else self._document(text)

    def _document(self, text: str) -> Kept:
        found = codes(text)
        letters = np.count_nonzero(self.letters[found])
        enough = not letters or np.count_nonzero(self.allowed[found]) / letters >= self.min_share
        return Kept(text) if enough else Kept("", document=True)

    def _lines(self, text: str) -> Kept:
        found = codes(text)
        starts = np.concatenate(([0], np.flatnonzero(found == ord("\n")) + 1))
        found = np.append(found, ord("\n"))  # so that a line begins, and is summed up, even where the last one is empty
        letters = np.add.reduceat(self.letters[found], starts, dtype=np.int64)
        allowed = np.add.reduceat(self.allowed[found], starts, dtype=np.int64)
        good = allowed / np.maximum(letters, 1) >= self.min_share
        good |= letters == 0
        if good.all():
            return Kept(text)
        lines = text.split("\n")
        kept = "\n".join(line for line, keep in zip(lines, good, strict=True) if keep)
        dropped = tuple(line for line, keep in zip(lines, good, strict=True) if not keep)
        return Kept(kept, lines=dropped) if kept.strip() else Kept("", document=True, lines=dropped)
