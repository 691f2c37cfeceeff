"""Which documents of a source are too short, too long, or repeat themselves: one reason for each that is dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.cleaning_report import Tally
from azrecipe.recipe.types import Filters, Source, TextSource

VERSION = 1  # of the rules below: text kept by other ones is not taken from the cache

# Rae et al. 2021 (arXiv:2112.11446), table A1: a document with more than this is dropped.
LINES, PARAGRAPHS, LINE_CHARACTERS, PARAGRAPH_CHARACTERS = 0.30, 0.30, 0.20, 0.20
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_PARAGRAPH = re.compile(r"\n{2,}")
_LINE = re.compile(r"\n+")

Ints = npt.NDArray[np.int64]


class Filter:
    """The filters that a source asks for."""

    def __init__(self, asked: Filters) -> None:
        self.asked = asked
        limits = {"min_characters": asked.min_characters, "max_characters": asked.max_characters, "repetition": asked.repetition}
        self.reasons = [name for name, value in limits.items() if value]

    def __call__(self, text: str, tally: Tally) -> bool:
        """Whether a document is kept; one that is not is counted under the first reason."""
        if not tally.filtered:
            tally.filtered.update(dict.fromkeys(self.reasons, 0))
        if self.asked.min_characters is not None and len(text) < self.asked.min_characters:
            tally.refuse("min_characters", text, {"characters": len(text)})
        elif self.asked.max_characters is not None and len(text) > self.asked.max_characters:
            tally.refuse("max_characters", text, {"characters": len(text)})
        elif self.asked.repetition and (found := next(repetitions(text), None)):
            tally.refuse("repetition", text, {"limit": found[0], "found": round(found[1], 3)})
        else:
            return True
        return False


def repetitions(text: str) -> Iterator[tuple[str, float]]:
    """The limits on repetition that a text exceeds, and the shares found: of its lines, paragraphs or characters.

    A duplicate is an occurrence after the first. Words are what stands between white space; n-grams do not cross the
    text's end but do cross lines. Characters are those of the words, of whole text with its white space.
    """
    for name, pieces, most, most_characters in (
        ("paragraphs", _PARAGRAPH.split(text.strip()), PARAGRAPHS, PARAGRAPH_CHARACTERS),
        ("lines", _LINE.split(text.strip()), LINES, LINE_CHARACTERS),
    ):
        count, characters = _repeated(pieces)
        if count / len(pieces) > most:
            yield f"duplicate {name}", count / len(pieces)
        if characters / len(text) > most_characters:
            yield f"characters in duplicate {name}", characters / len(text)
    words = text.split()
    ids = _numbered(words)
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    grams = ids
    for n in range(2, min(max(DUPLICATE), len(words)) + 1):
        # pairs of numbers below 2^31, numbered anew: exact, and equal n-grams get equal numbers
        _, first, grams, counts = np.unique(
            grams[:-1] * len(words) + ids[n - 1 :], return_index=True, return_inverse=True, return_counts=True
        )
        if n in TOP:
            lengths = (ends[n:] - ends[:-n])[first] + n - 1
            share = float(np.max(np.where(counts == counts.max(), lengths, 0)) * counts.max()) / len(text) if counts.max() > 1 else 0.0
            if share > TOP[n]:
                yield f"characters in the most frequent {n}-gram", share
        elif n in DUPLICATE:
            again = np.ones(len(grams), np.int64)
            again[first] = 0
            covered = np.convolve(again, np.ones(n, np.int64))[: len(words)] > 0
            if (share := float(sizes[covered].sum()) / len(text)) > DUPLICATE[n]:
                yield f"characters in duplicate {n}-grams", share
        if counts.max() == 1:
            return  # no longer n-gram occurs twice either


def _repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces have occurred before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count, characters


def _numbered(words: Sequence[str]) -> Ints:
    """Words as numbers, equal for equal ones."""
    known: dict[str, int] = {}
    return np.fromiter((known.setdefault(word, len(known)) for word in words), np.int64, len(words))


def of(source: Source) -> Filters | None:
    """The filters of a source, if it has any."""
    return source.filters if isinstance(source, TextSource) else None


def identity(source: Source) -> dict[str, Any]:
    """The filters of a source, for a cache key; empty where there are none."""
    asked = of(source)
    return {} if asked is None else {"rules": VERSION, **vars(asked)}
