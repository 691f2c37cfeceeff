"""Measure generated texts: language, script, repetition and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from azrecipe.data.unicode_scripts import COMBINING_MARK, SCRIPT_NAMES, build_script_table, to_code_points
from azrecipe.recipe.extras import check_extra
from azrecipe.recipe.types import EvaluateConfig
from azrecipe.utils.bootstrap import BootstrapEstimate, Resampling

DEFAULT_LANGUAGES = ("en", "ru", "tr")  # candidates beside the expected languages, unless the recipe lists its own
PACKAGES_MESSAGE = "detecting languages needs lingua, and comparing answers needs sacrebleu and rouge_score"
NGRAM_SIZE = 4  # words in an n-gram of `repetition`


@dataclass(frozen=True)
class ExpectedOutput:
    """The language (ISO 639-1) and script expected of a text, or None."""

    language: str | None
    script: str | None


def check_evaluation_packages(config: EvaluateConfig) -> None:
    """Check that the packages that a recipe needs are installed.

    Raises CannotRun.
    """
    packages = (["lingua"] if list_candidate_languages(config) else []) + (["sacrebleu", "rouge_score"] if config.answers else [])
    check_extra("evaluation", PACKAGES_MESSAGE, packages)


def list_expected_outputs(config: EvaluateConfig) -> list[ExpectedOutput]:
    """List what the recipe expects of the output of each prompt."""
    default = ExpectedOutput(config.language, config.script)
    languages = [None if isinstance(prompt, str) else prompt.language for prompt in config.prompts]
    return [default if language in (None, config.language) else ExpectedOutput(language, None) for language in languages]


def list_candidate_languages(config: EvaluateConfig) -> list[str]:
    """List the codes of the languages to decide between.

    Empty where the recipe expects no language.
    """
    expected_codes = [output.language for output in list_expected_outputs(config)] + ([config.language] if config.answers else [])
    codes = dict.fromkeys(code for code in expected_codes if code)
    return list(dict.fromkeys([*codes, *(config.languages or DEFAULT_LANGUAGES)])) if codes else []


class LanguageDetector:
    """lingua's models of some languages, loaded once.

    Raises CannotRun where lingua is not installed.
    """

    def __init__(self, codes: Sequence[str]) -> None:
        check_extra("evaluation", PACKAGES_MESSAGE, ["lingua"])
        from lingua import IsoCode639_1, LanguageDetectorBuilder

        self.detector = LanguageDetectorBuilder.from_iso_codes_639_1(*(getattr(IsoCode639_1, code.upper()) for code in codes)).build()

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """Detect the language code of each text; None where undecided."""
        return [
            language.iso_code_639_1.name.lower() if language else None
            for language in self.detector.detect_languages_in_parallel_of(list(texts))
        ]


def count_repeated_ngrams(text: str) -> tuple[int, int]:
    """Count n-grams of NGRAM_SIZE words: (those that occurred before, all).

    Words are what white space separates.
    """
    words = text.split()
    grams = [tuple(words[i : i + NGRAM_SIZE]) for i in range(len(words) - NGRAM_SIZE + 1)]
    return len(grams) - len(set(grams)), len(grams)


def count_script_letters(text: str, script: str) -> tuple[int, int]:
    """Count letters of a text: (those of a script, all)."""
    scripts = build_script_table()[to_code_points(text)]
    return int(np.count_nonzero(scripts == SCRIPT_NAMES.index(script) + 1)), int(
        np.count_nonzero((scripts > 0) & (scripts < COMBINING_MARK))
    )


def annotate_language(
    generations: Sequence[Mapping[str, Any]], expected: Sequence[ExpectedOutput], detector: LanguageDetector | None
) -> list[dict[str, Any]]:
    """Add to each generation the language that it is in.

    Only outputs with an expected language get one.

    Args:
        generations: Generations, with "output".
        expected: What is expected of each.
        detector: None where no language is expected.
    """
    codes = detector([line["output"] for line in generations]) if detector else [None] * len(generations)
    return [
        {**line, "language": code} if expectation.language else dict(line)
        for line, code, expectation in zip(generations, codes, expected, strict=True)
    ]


def estimate_output_metrics(
    generations: Sequence[Mapping[str, Any]], expected: Sequence[ExpectedOutput], resampling: Resampling
) -> dict[str, BootstrapEstimate]:
    """Estimate the metrics of one model's generations.

    docs/metrics.md defines each.

    Args:
        generations: Generations, as `annotate_language` returns them.
        expected: What is expected of each.
        resampling: Bootstrap resamples of the prompts.

    Returns:
        An estimate for each metric.
    """
    texts = [line["output"] for line in generations]
    ones = np.ones(len(generations))
    estimates = {}
    has_language = np.array([expectation.language is not None for expectation in expected])
    if has_language.any():
        is_right = has_language * np.array(
            [line.get("language") == expectation.language for line, expectation in zip(generations, expected, strict=True)]
        )
        characters = np.array([len(text) for text in texts])
        estimates["language"] = resampling.estimate_ratio(is_right * ones, has_language * ones)
        estimates["language_characters"] = resampling.estimate_ratio(is_right * characters, has_language * characters)
    if any(expectation.script for expectation in expected):
        letters = np.array(
            [
                count_script_letters(text, expectation.script) if expectation.script else (0, 0)
                for text, expectation in zip(texts, expected, strict=True)
            ]
        )
        estimates["script"] = resampling.estimate_ratio(letters[:, 0], letters[:, 1])
    grams = np.array([count_repeated_ngrams(text) for text in texts])
    estimates["repetition"] = resampling.estimate_ratio(grams[:, 0], grams[:, 1])
    estimates["ended"] = resampling.estimate_ratio(np.array([line["ended"] for line in generations]) * ones, ones)
    estimates["tokens"] = resampling.estimate_ratio(np.array([line["tokens"] for line in generations]), ones)
    estimates["words"] = resampling.estimate_ratio(np.array([len(text.split()) for text in texts]), ones)
    estimates["bytes"] = resampling.estimate_ratio(np.array([len(text.encode()) for text in texts]), ones)
    return estimates
