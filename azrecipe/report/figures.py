"""How measured numbers are named and written, for the terminal and for pages alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from azrecipe.report.plots import Point

PERCENT = ".1%"
# The measures of a held-out set, in the order in which they are shown.
MEASURES: Mapping[str, str] = {
    "fertility": "tokens/word",
    "bytes_per_token": "bytes/token",
    "words_in_window": "words in {window} tokens",
    "strr": "whole words",
    "continued_words": "continued words",
    "renyi_efficiency": "Rényi efficiency",
    "tokens_vs_baseline": "tokens vs. base",
}
_FORMATS: Mapping[str, str] = {
    "words_in_window": ",.0f", "strr": PERCENT, "continued_words": PERCENT, "renyi_efficiency": ".3f", "tokens_vs_baseline": ".3f",
}  # fmt: skip


def number(value: float | None, sign: bool = False) -> str:
    """A whole number with separators; a dash for an unknown one."""
    return "–" if value is None else f"{value:{'+' if sign and value else ''},}"


def short(measure: Mapping[str, Any], key: str = "") -> str:
    """A measure's value alone."""
    return "–" if measure["value"] is None else f"{measure['value']:{_FORMATS.get(key, '.2f')}}"


def with_interval(measure: Mapping[str, Any], key: str = "") -> str:
    """A measure with its interval in brackets, where it has one."""
    if measure["value"] is None or measure["interval"] is None:
        return short(measure, key)
    form = _FORMATS.get(key, ".2f")
    low, high = measure["interval"]
    return f"{measure['value']:{form}} [{low:{form}}–{high:{form}}]"


def series(result: Mapping[str, Any], key: str = "fertility") -> dict[str, dict[str, list[Point]]]:
    """A tokenizer result as points over vocabulary size: for each held-out set, a series for each family of candidates."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for name in result["validation"]:
        panel = panels.setdefault(name, {})
        for line in result["candidates"]:
            measure = line[key][name]
            if measure["value"] is not None:
                panel.setdefault(_family(line), []).append(Point(line["name"], line["vocab_size"], measure["value"], measure["interval"]))
    return panels


def axes(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A comparison's points of training and its held-out sets, the ranked one first."""
    found = [row["bpb_after"] for row in result["ranking"]]
    points = list(dict.fromkeys(point for after in found for point in after))
    sets = list(dict.fromkeys([result["dataset"], *(name for after in found for values in after.values() for name in values)]))
    return points, sets


def _family(line: Mapping[str, Any]) -> str:
    rules = line.get("pre_tokenizer", "base")
    protected = " (protected)" if line.get("protect") else ""
    return str(line["kind"]) + ("" if rules == "base" else f", {rules}") + protected
