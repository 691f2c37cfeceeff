"""How a source's text is cleaned: one spelling for what is written in several ways, and an account of all that it changed.

Each step names the pieces of a text that it replaces, so that every change can be counted and shown.
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
from azrecipe.data.cleaning_report import Edit, Tally, apply
from azrecipe.recipe.types import ValidationSource

VERSION = 1  # of the rules below: text tokenised by other ones is not taken from the cache


INVISIBLE = "\u00ad\ufeff\u200b\u2060"  # not U+200C, U+200D: Arabic script and emoji are written with them
DOT = "\u0307"
_INVISIBLE = re.compile(f"[{INVISIBLE}]+")
_CLUSTER = regex.compile(r"\X")
# Marks between i and its dot must not stand above, as in Unicode's SpecialCasing (After_I): í̇ is not a lower-case İ.
_DOTTED = regex.compile(rf"(?V1)[iıįịḭI][{DOT}[\p{{M}}--[\p{{ccc=0}}\p{{ccc=230}}]]]+")

# Letters that look alike, Latin above Cyrillic. Letters of one case only (к, т: K, T) decide nothing in the other.
_LATIN = "aeopcxyijhsəqwæABCEHIJKMOPSTXƏQWÆ"
_CYRILLIC = "аеорсхуіјһѕәԛԝӕАВСЕНІЈКМОРЅТХӘԚԜӔ"
_REVERSED = {"ǝ": "ə", "Ǝ": "Ə"}
# У and Ү both look like Y: a Y in a Cyrillic word could be either, so it has no way back and counts as Latin.
TO_LATIN: Mapping[str, str] = {**dict(zip(_CYRILLIC, _LATIN, strict=True)), "У": "Y", "Ү": "Y", "Һ": "H", **_REVERSED}
TO_CYRILLIC: Mapping[str, str] = {**dict(zip(_LATIN, _CYRILLIC, strict=True)), "ǝ": "ә", "Ǝ": "Ә"}

_LETTER = r"[\p{L}--\p{Lm}]"  # ʻ and ʼ are letters (Lm) to Unicode; here they are what is looked for
_BETWEEN = rf"(?<=[{_LETTER}\p{{M}}].)(?={_LETTER})"  # of the mark before it
_APOSTROPHES = regex.compile(rf"(?V1)[’ʼ＇]{_BETWEEN}")
_UZBEK = regex.compile(rf"(?V1)['‘’ʼ`´＇](?<=[oOgG].)|['‘’`´＇]{_BETWEEN}")
_IN_WORD = regex.compile(rf"(?V1)[{_LETTER}\p{{M}}]")


def _nfc(text: str) -> Iterator[Edit]:
    if unicodedata.is_normalized("NFC", text):
        return
    for match in _CLUSTER.finditer(text):  # composition never reaches beyond a grapheme cluster
        composed = unicodedata.normalize("NFC", match[0])
        if composed != match[0]:
            yield match.start(), match.end(), composed


def _invisible(text: str) -> Iterator[Edit]:
    if any(character in text for character in INVISIBLE):
        for match in _INVISIBLE.finditer(text):
            yield match.start(), match.end(), ""


def _dotted_i(text: str) -> Iterator[Edit]:
    """`"İ".lower()` is i and a combining dot; so are, after other casings, ı with a dot (an i) and I with one (an İ)."""
    if DOT not in text:
        return
    for match in _DOTTED.finditer(text):
        start, run = match.start(), match[0]
        if run[0] == "I":
            if run[1] == DOT:
                yield start, start + 2, "İ"
            continue
        if run[0] == "ı" and DOT in run:
            yield start, start + 1, "i"
        for at, character in enumerate(run):
            if character == DOT:
                yield start + at, start + at + 1, ""


def _look_alikes(text: str) -> Iterator[Edit]:
    """Words with letters of both scripts next to each other, and words with a ǝ; others cannot need a change."""
    if text.isascii():
        return
    ids = unicode_scripts.table()[unicode_scripts.codes(text)]
    at = np.flatnonzero(ids != unicode_scripts.MARK)
    left, right = ids[at[:-1]], ids[at[1:]]
    both = ((left == unicode_scripts.LATIN) & (right == unicode_scripts.CYRILLIC)) | (
        (left == unicode_scripts.CYRILLIC) & (right == unicode_scripts.LATIN)
    )
    mixed = at[:-1][both]
    places = sorted({*mixed.tolist(), *(match.start() for match in re.finditer("[ǝƎ]", text))})
    if not places:
        return
    borders = np.concatenate(([-1], np.flatnonzero(ids == 0), [len(ids)]))
    done = 0
    for place in places:
        if place >= done:
            after = int(np.searchsorted(borders, place))
            start, done = int(borders[after - 1]) + 1, int(borders[after])
            for i, new in _folded(text[start:done]):
                yield start + i, start + i + 1, new


def _folded(word: str) -> Iterator[tuple[int, str]]:
    """Where a word's look-alikes are to be replaced, and by what.

    Only letters that look like no other say which script the word is in. Without any (СОСНА could be COCHA), or with some of
    both (webсайт), nobody can tell, and the word is left as it is.
    """
    of = unicode_scripts.table()[unicode_scripts.codes(word)].tolist()
    letters = {i: script for i, script in enumerate(of) if script != unicode_scripts.MARK}
    sure = {script for i, script in letters.items() if word[i] not in TO_LATIN and word[i] not in TO_CYRILLIC}
    if sure == {unicode_scripts.LATIN}:
        fold = TO_LATIN
    elif sure == {unicode_scripts.CYRILLIC}:
        fold = TO_CYRILLIC
    elif not sure and set(letters.values()) == {unicode_scripts.LATIN}:
        fold = _REVERSED
    else:
        return
    if fold is not _REVERSED and _acronym(word, fold):
        return
    for i, letter in enumerate(word):
        if letter in fold:
            yield i, fold[letter]


def _acronym(word: str, fold: Mapping[str, str]) -> bool:
    """Whether the look-alikes of a word are capitals of another language's: SMS in SMSки is Latin indeed."""
    foreign = [letter in fold and letter.isupper() and letter not in _REVERSED for letter in word]
    return any(a and b for a, b in pairwise(foreign)) and not word.isupper()


def _apostrophes(text: str) -> Iterator[Edit]:
    if any(mark in text for mark in "’ʼ＇"):
        for match in _APOSTROPHES.finditer(text):
            yield match.start(), match.end(), "'"


def _uzbek_apostrophes(text: str) -> Iterator[Edit]:
    for match in _UZBEK.finditer(text):
        at = match.start()
        if text[at - 1] not in "oOgG":
            yield at, at + 1, "ʼ"
        elif not _closes(text, at):
            yield at, at + 1, "ʻ"


def _closes(text: str, at: int) -> bool:
    """Whether a mark at a word's end is the quotation mark that one right before the word opened: 'palto'."""
    if at + 1 < len(text) and _IN_WORD.match(text, at + 1):
        return False
    start = at
    while start and _IN_WORD.match(text, start - 1):
        start -= 1
    return start > 0 and text[start - 1] in "'‘`´＇"


# In the order in which they are made, which is the schema's.
STEPS: Mapping[str, Callable[[str], Iterator[Edit]]] = {
    "nfc": _nfc,
    "invisible": _invisible,
    "dotted_i": _dotted_i,
    "look_alikes": _look_alikes,
    "apostrophes": _apostrophes,
    "uzbek_apostrophes": _uzbek_apostrophes,
}


class Cleaner:
    """The clean-up that a source asks for; without any, text stays as it is, byte for byte."""

    def __init__(self, source: ValidationSource) -> None:
        self.steps = [(name, step) for name, step in STEPS.items() if name in source.normalize]
        self.filter = unicode_scripts.Filter(source.scripts) if source.scripts else None

    def __call__(self, text: str, tally: Tally) -> str:
        """The cleaned document, empty if nothing of it is kept."""
        tally.documents += 1
        tally.bytes += len(text.encode())
        made = self._uniform(text, tally)
        tally.changed_documents += made != text
        if not made.strip():
            tally.dropped_documents += 1
            tally.dropped_bytes += len(made.encode())
            return ""
        if self.filter is None:
            return made
        kept = self.filter(made)
        if kept.document or kept.lines:
            tally.drop(made, kept)
        return kept.text

    def _uniform(self, text: str, tally: Tally) -> str:
        """Every step, until none finds anything to do: a letter folded may compose with the mark after it."""
        while True:
            before = text
            for name, step in self.steps:
                if edits := list(step(text)):
                    tally.edit(name, text, edits)
                    text = apply(text, edits)
            if text == before:
                return text


def asks(source: ValidationSource) -> bool:
    """Whether a source has any clean-up."""
    return bool(source.normalize or source.scripts)


def identity(source: ValidationSource) -> dict[str, Any]:
    """The clean-up of a source, for a cache key; empty where there is none."""
    if not asks(source):
        return {}
    found: dict[str, Any] = {"rules": VERSION, "normalize": [name for name in STEPS if name in source.normalize]}
    if source.scripts is not None:
        found["scripts"] = [sorted(source.scripts.allow), source.scripts.min_share, source.scripts.unit]
    return found
