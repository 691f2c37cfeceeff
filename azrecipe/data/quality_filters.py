"""Drop documents that are too short, too long or repeat themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from azrecipe.data.cleaning_report import CleaningReport
from azrecipe.recipe.types import Filters, Source, TextSource
from azrecipe.utils.bootstrap import IntArray

RULES_VERSION = 1  # of the rules below; the cache does not mix versions

# Rae et al. 2021 (arXiv:2112.11446), table A1: a document above any of these shares is dropped.
MAX_DUPLICATE_LINES, MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_LINE_CHARACTERS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.30, 0.20, 0.20
MAX_TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_PARAGRAPH = re.compile(r"\n{2,}")
_LINE = re.compile(r"\n+")


class QualityFilter:
    """The quality filters of a source."""

    def __init__(self, settings: Filters) -> None:
        self.settings = settings
        limits = {"min_characters": settings.min_characters, "max_characters": settings.max_characters, "repetition": settings.repetition}
        self.reasons = [name for name, value in limits.items() if value]

    def __call__(self, text: str, report: CleaningReport) -> bool:
        """Whether a document is kept.

        The report counts a dropped one under its first reason.
        """
        for reason in self.reasons:
            report.filtered.setdefault(reason, 0)
        if self.settings.min_characters is not None and len(text) < self.settings.min_characters:
            report.record_refusal("min_characters", text, {"characters": len(text)})
        elif self.settings.max_characters is not None and len(text) > self.settings.max_characters:
            report.record_refusal("max_characters", text, {"characters": len(text)})
        elif self.settings.repetition and (repetition := next(find_repetitions(text), None)):
            report.record_refusal("repetition", text, {"limit": repetition[0], "found": round(repetition[1], 3)})
        else:
            return True
        return False


def find_repetitions(text: str) -> Iterator[tuple[str, float]]:
    """Find the limits on repetition that a text exceeds.

    A duplicate is an occurrence after the first. Words are separated by white space; n-grams cross the ends of lines.
    Characters are counted within the words, as a share of the whole text with its white space.

    Yields:
        The name of the limit, and the share of lines, paragraphs or characters that exceeds it.
    """
    for name, pieces, max_share, max_character_share in (
        ("paragraphs", _PARAGRAPH.split(text.strip()), MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS),
        ("lines", _LINE.split(text.strip()), MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS),
    ):
        count, characters = _count_duplicates(pieces)
        if count / len(pieces) > max_share:
            yield f"duplicate {name}", count / len(pieces)
        if characters / len(text) > max_character_share:
            yield f"characters in duplicate {name}", characters / len(text)
    words = text.split()
    ids = _number_words(words)
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    grams = ids
    for n in range(2, min(max(MAX_DUPLICATE_NGRAM_CHARACTERS), len(words)) + 1):
        # Pairs of numbers below 2^31 get new numbers: exact, and equal n-grams get equal numbers
        _, first, grams, counts = np.unique(
            grams[:-1] * len(words) + ids[n - 1 :], return_index=True, return_inverse=True, return_counts=True
        )
        if n in MAX_TOP_NGRAM_CHARACTERS:
            lengths = (ends[n:] - ends[:-n])[first] + n - 1
            share = float(np.max(np.where(counts == counts.max(), lengths, 0)) * counts.max()) / len(text) if counts.max() > 1 else 0.0
            if share > MAX_TOP_NGRAM_CHARACTERS[n]:
                yield f"characters in the most frequent {n}-gram", share
        elif n in MAX_DUPLICATE_NGRAM_CHARACTERS:
            is_duplicate = np.ones(len(grams), np.int64)
            is_duplicate[first] = 0
            covered = np.convolve(is_duplicate, np.ones(n, np.int64))[: len(words)] > 0
            if (share := float(sizes[covered].sum()) / len(text)) > MAX_DUPLICATE_NGRAM_CHARACTERS[n]:
                yield f"characters in duplicate {n}-grams", share
        if counts.max() == 1:
            return  # then no longer n-gram occurs twice


def _count_duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """Count the pieces that occurred before, and their characters."""
    distinct: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in distinct:
            count += 1
            characters += len(piece)
        distinct.add(piece)
    return count, characters


def _number_words(words: Sequence[str]) -> IntArray:
    """Number the words, equal ones alike, [words]."""
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))


def get_filters(source: Source) -> Filters | None:
    """Get the quality filters of a source, if it has any."""
    return source.filters if isinstance(source, TextSource) else None


def describe_filters(source: Source) -> dict[str, Any]:
    """Describe a source's quality filters for a cache key; empty without any."""
    settings = get_filters(source)
    return {} if settings is None else {"rules": RULES_VERSION, **vars(settings)}
