"""What can be told of texts that a model wrote: in which language and script they are, how they repeat themselves, how long they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from azrecipe.data.unicode_scripts import MARK, NAMES, codes, table
from azrecipe.errors import CannotRun
from azrecipe.recipe.types import Evaluate
from azrecipe.utils.bootstrap import Estimate, Resampling

ALWAYS = ("en", "ru", "tr")  # decided between beside the expected languages, unless the recipe lists its own
GRAM = 4  # words of the n-grams of `repetition`
MISSING = "telling languages apart needs lingua, and comparing answers sacrebleu and rouge_score: pip install 'azrecipe[evaluation]'"


@dataclass(frozen=True)
class Expected:
    """What a text should be in: a language's ISO 639-1 code, a script's name; None where nothing is expected."""

    language: str | None
    script: str | None


def check(config: Evaluate) -> None:
    """Raise CannotRun for a recipe that needs packages which are not here."""
    needed = (["lingua"] if languages(config) else []) + (["sacrebleu", "rouge_score"] if config.answers else [])
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise CannotRun(MISSING)


def expected(config: Evaluate) -> list[Expected]:
    """What the recipe expects of each of its prompts."""
    whole = Expected(config.language, config.script)
    own = [None if isinstance(prompt, str) else prompt.language for prompt in config.prompts]
    return [whole if language in (None, config.language) else Expected(language, None) for language in own]


def languages(config: Evaluate) -> list[str]:
    """The languages that are decided between, by their codes; none where no language is expected."""
    wanted = [found.language for found in expected(config)] + ([config.language] if config.answers else [])
    found = dict.fromkeys(code for code in wanted if code)
    return list(dict.fromkeys([*found, *(config.languages or ALWAYS)])) if found else []


class Detector:
    """lingua's models of some languages, opened once. Raises CannotRun where lingua is not installed."""

    def __init__(self, codes: Sequence[str]) -> None:
        try:
            from lingua import IsoCode639_1, LanguageDetectorBuilder
        except ImportError:
            raise CannotRun(MISSING) from None
        self.detector = LanguageDetectorBuilder.from_iso_codes_639_1(*(getattr(IsoCode639_1, code.upper()) for code in codes)).build()

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """The language of each text by its code; None for a text that shows none."""
        return [
            found.iso_code_639_1.name.lower() if found else None for found in self.detector.detect_languages_in_parallel_of(list(texts))
        ]


def repeated(text: str) -> tuple[int, int]:
    """(n-grams of GRAM words that occurred before, all of them), of a text's words between white space."""
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def in_script(text: str, script: str) -> tuple[int, int]:
    """(letters of a text that are of a script, letters)."""
    of = table()[codes(text)]
    return int(np.count_nonzero(of == NAMES.index(script) + 1)), int(np.count_nonzero((of > 0) & (of < MARK)))


def tell(written: Sequence[Mapping[str, Any]], wanted: Sequence[Expected], detector: Detector | None) -> list[dict[str, Any]]:
    """Each generation with the language that it is in, where one is expected of it."""
    found = detector([line["output"] for line in written]) if detector else [None] * len(written)
    return [{**line, "language": code} if want.language else dict(line) for line, code, want in zip(written, found, wanted, strict=True)]


def estimates(told: Sequence[Mapping[str, Any]], wanted: Sequence[Expected], resampling: Resampling) -> dict[str, Estimate]:
    """The measures of one model's generations; docs/metrics.md defines each."""
    texts = [line["output"] for line in told]
    ones = np.ones(len(told))
    found = {}
    asked = np.array([want.language is not None for want in wanted])
    if asked.any():
        right = asked * np.array([line.get("language") == want.language for line, want in zip(told, wanted, strict=True)])
        characters = np.array([len(text) for text in texts])
        found["language"] = resampling.estimate(right * ones, asked * ones)
        found["language_characters"] = resampling.estimate(right * characters, asked * characters)
    if any(want.script for want in wanted):
        letters = np.array([in_script(text, want.script) if want.script else (0, 0) for text, want in zip(texts, wanted, strict=True)])
        found["script"] = resampling.estimate(letters[:, 0], letters[:, 1])
    grams = np.array([repeated(text) for text in texts])
    found["repetition"] = resampling.estimate(grams[:, 0], grams[:, 1])
    found["ended"] = resampling.estimate(np.array([line["ended"] for line in told]) * ones, ones)
    found["tokens"] = resampling.estimate(np.array([line["tokens"] for line in told]), ones)
    found["words"] = resampling.estimate(np.array([len(text.split()) for text in texts]), ones)
    found["bytes"] = resampling.estimate(np.array([len(text.encode()) for text in texts]), ones)
    return found
