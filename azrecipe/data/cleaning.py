"""Clean the text of a source: one spelling for equal characters.

Each step yields the parts of a text that it replaces, so that every change can be counted and shown.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import regex

from azrecipe.data import unicode_scripts
from azrecipe.data.cleaning_report import CleaningReport, Edit, apply_edits
from azrecipe.recipe.types import ValidationSource

RULES_VERSION = 1  # of the rules below; the cache does not mix versions

INVISIBLE_CHARACTERS = "\u00ad\ufeff\u200b\u2060"  # not U+200C, U+200D: Arabic script and emoji are written with them
COMBINING_DOT = "\u0307"
_INVISIBLE = re.compile(f"[{INVISIBLE_CHARACTERS}]+")
_CLUSTER = regex.compile(r"\X")
# Marks between i and its dot must not sit above the letter, as in Unicode's SpecialCasing (After_I): í̇ is not a lower-case İ.
_DOTTED = regex.compile(rf"(?V1)[iıįịḭI][{COMBINING_DOT}[\p{{M}}--[\p{{ccc=0}}\p{{ccc=230}}]]]+")

# Letters that look alike, Latin above Cyrillic. A letter that looks alike in one case only (к, т: K, T) is there in that case only.
_LATIN = "aeopcxyijhsəqwæABCEHIJKMOPSTXƏQWÆ"
_CYRILLIC = "аеорсхуіјһѕәԛԝӕАВСЕНІЈКМОРЅТХӘԚԜӔ"
_REVERSED = {"ǝ": "ə", "Ǝ": "Ə"}
# У and Ү both look like Y. A Y in a Cyrillic word could be either, so it stays as it is and counts as Latin.
TO_LATIN: Mapping[str, str] = {**dict(zip(_CYRILLIC, _LATIN, strict=True)), "У": "Y", "Ү": "Y", "Һ": "H", **_REVERSED}
TO_CYRILLIC: Mapping[str, str] = {**dict(zip(_LATIN, _CYRILLIC, strict=True)), "ǝ": "ә", "Ǝ": "Ә"}

_LETTER = r"[\p{L}--\p{Lm}]"  # without ʻ and ʼ, which Unicode counts as letters (Lm): the patterns look for them
_BETWEEN = rf"(?<=[{_LETTER}\p{{M}}].)(?={_LETTER})"  # of the mark before this pattern
_APOSTROPHES = regex.compile(rf"(?V1)[’ʼ＇]{_BETWEEN}")
_UZBEK = regex.compile(rf"(?V1)['‘’ʼ`´＇](?<=[oOgG].)|['‘’`´＇]{_BETWEEN}")
_IN_WORD = regex.compile(rf"(?V1)[{_LETTER}\p{{M}}]")


def _nfc(text: str) -> Iterator[Edit]:
    if unicodedata.is_normalized("NFC", text):
        return
    for match in _CLUSTER.finditer(text):  # composition never reaches beyond a grapheme cluster
        composed = unicodedata.normalize("NFC", match[0])
        if composed != match[0]:
            yield Edit(match.start(), match.end(), composed)


def _invisible(text: str) -> Iterator[Edit]:
    if any(character in text for character in INVISIBLE_CHARACTERS):
        for match in _INVISIBLE.finditer(text):
            yield Edit(match.start(), match.end(), "")


def _dotted_i(text: str) -> Iterator[Edit]:
    """Replace a letter and a combining dot by one letter.

    `"İ".lower()` is i and a combining dot. Other changes of case leave ı with a dot (an i) and I with a dot (an İ).
    """
    if COMBINING_DOT not in text:
        return
    for match in _DOTTED.finditer(text):
        start, run = match.start(), match[0]
        if run[0] == "I":
            if run[1] == COMBINING_DOT:
                yield Edit(start, start + 2, "İ")
            continue
        if run[0] == "ı" and COMBINING_DOT in run:
            yield Edit(start, start + 1, "i")
        for offset, character in enumerate(run):
            if character == COMBINING_DOT:
                yield Edit(start + offset, start + offset + 1, "")


def _look_alikes(text: str) -> Iterator[Edit]:
    """Replace look-alike letters of another script.

    Only words with letters of both scripts next to each other, and words with a ǝ, can need a change.
    """
    if text.isascii():
        return
    ids = unicode_scripts.build_script_table()[unicode_scripts.to_code_points(text)]
    places = np.flatnonzero(ids != unicode_scripts.COMBINING_MARK)
    left, right = ids[places[:-1]], ids[places[1:]]
    both = ((left == unicode_scripts.LATIN) & (right == unicode_scripts.CYRILLIC)) | (
        (left == unicode_scripts.CYRILLIC) & (right == unicode_scripts.LATIN)
    )
    mixed = places[:-1][both]
    candidates = sorted({*mixed.tolist(), *(match.start() for match in re.finditer("[ǝƎ]", text))})
    if not candidates:
        return
    borders = np.concatenate(([-1], np.flatnonzero(ids == 0), [len(ids)]))
    end = 0
    for candidate in candidates:
        if candidate >= end:
            border = int(np.searchsorted(borders, candidate))
            start, end = int(borders[border - 1]) + 1, int(borders[border])
            for i, letter in _fold_word(text[start:end]):
                yield Edit(start + i, start + i + 1, letter)


def _fold_word(word: str) -> Iterator[tuple[int, str]]:
    """Find the look-alikes of a word: their places and replacements.

    Only letters that look like no other decide which script a word is in. Where there are none (СОСНА could be COCHA), or
    some of both scripts (webсайт), the word stays as it is.
    """
    scripts = unicode_scripts.build_script_table()[unicode_scripts.to_code_points(word)].tolist()
    letters = {i: script for i, script in enumerate(scripts) if script != unicode_scripts.COMBINING_MARK}
    decisive = {script for i, script in letters.items() if word[i] not in TO_LATIN and word[i] not in TO_CYRILLIC}
    if decisive == {unicode_scripts.LATIN}:
        fold = TO_LATIN
    elif decisive == {unicode_scripts.CYRILLIC}:
        fold = TO_CYRILLIC
    elif not decisive and set(letters.values()) == {unicode_scripts.LATIN}:
        fold = _REVERSED
    else:
        return
    if fold is not _REVERSED and _has_acronym(word, fold):
        return
    for i, letter in enumerate(word):
        if letter in fold:
            yield i, fold[letter]


def _has_acronym(word: str, fold: Mapping[str, str]) -> bool:
    """Whether a word has an acronym of another script: SMS in SMSки."""
    foreign = [letter in fold and letter.isupper() and letter not in _REVERSED for letter in word]
    return any(a and b for a, b in pairwise(foreign)) and not word.isupper()


def _apostrophes(text: str) -> Iterator[Edit]:
    if any(mark in text for mark in "’ʼ＇"):
        for match in _APOSTROPHES.finditer(text):
            yield Edit(match.start(), match.end(), "'")


def _uzbek_apostrophes(text: str) -> Iterator[Edit]:
    for match in _UZBEK.finditer(text):
        place = match.start()
        if text[place - 1] not in "oOgG":
            yield Edit(place, place + 1, "ʼ")
        elif not _closes_quotation(text, place):
            yield Edit(place, place + 1, "ʻ")


def _closes_quotation(text: str, place: int) -> bool:
    """Whether a mark at a word's end closes a quotation: 'palto'."""
    if place + 1 < len(text) and _IN_WORD.match(text, place + 1):
        return False
    start = place
    while start and _IN_WORD.match(text, start - 1):
        start -= 1
    return start > 0 and text[start - 1] in "'‘`´＇"


# In the order in which they run, which is the order of the schema.
STEPS: Mapping[str, Callable[[str], Iterator[Edit]]] = {
    "nfc": _nfc,
    "invisible": _invisible,
    "dotted_i": _dotted_i,
    "look_alikes": _look_alikes,
    "apostrophes": _apostrophes,
    "uzbek_apostrophes": _uzbek_apostrophes,
}


class TextCleaner:
    """The clean-up of a source; without steps it changes no byte."""

    def __init__(self, source: ValidationSource) -> None:
        self.steps = [(name, step) for name, step in STEPS.items() if name in source.normalize]
        self.script_filter = unicode_scripts.ScriptFilter(source.scripts) if source.scripts else None

    def __call__(self, text: str, report: CleaningReport) -> str:
        """Clean a document; returns an empty text where nothing is left."""
        report.documents += 1
        report.bytes += len(text.encode())
        cleaned = self._normalize(text, report)
        report.changed_documents += cleaned != text
        if not cleaned.strip():
            report.dropped_documents += 1
            report.dropped_bytes += len(cleaned.encode())
            return ""
        if self.script_filter is None:
            return cleaned
        filtered = self.script_filter(cleaned)
        if filtered.document_dropped or filtered.dropped_lines:
            report.record_drop(cleaned, filtered)
        return filtered.text

    def _normalize(self, text: str, report: CleaningReport) -> str:
        """Run all steps until none changes the text.

        A new letter may compose with the mark after it.
        """
        while True:
            before = text
            for name, step in self.steps:
                if edits := list(step(text)):
                    report.record_edits(name, text, edits)
                    text = apply_edits(text, edits)
            if text == before:
                return text


def has_cleaning(source: ValidationSource) -> bool:
    """Whether a source has a clean-up."""
    return bool(source.normalize or source.scripts)


def describe_cleaning(source: ValidationSource) -> dict[str, Any]:
    """Describe a source's clean-up for a cache key; empty without one."""
    if not has_cleaning(source):
        return {}
    description: dict[str, Any] = {"rules": RULES_VERSION, "normalize": [name for name in STEPS if name in source.normalize]}
    if source.scripts is not None:
        description["scripts"] = [sorted(source.scripts.allow), source.scripts.min_share, source.scripts.unit]
    return description
