"""How measured numbers are named and written, for the terminal and for pages alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from azrecipe.report.svg_plots import Point

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
# The measures of what models wrote that a table shows, in this order, and how their numbers are written.
WRITTEN: Mapping[str, tuple[str, str]] = {
    "chrf": ("chrF", ".1f"),
    "chrf++": ("chrF++", ".1f"),
    "rouge_l": ("ROUGE-L", ".1f"),
    "language": ("language", ".0%"),
    "script": ("script", PERCENT),
    "repetition": ("repetition", PERCENT),
    "ended": ("ended", ".0%"),
    "words": ("words", ".1f"),
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
    return interval(measure, _FORMATS.get(key, ".2f"))


def interval(measure: Mapping[str, Any], form: str) -> str:
    """The same, in a number format; a standard error where there is one instead of an interval."""
    if measure["value"] is None:
        return "–"
    text = f"{measure['value']:{form}}"
    if measure.get("stderr") is not None:
        return f"{text} ± {measure['stderr']:{form}}"
    if measure.get("interval") is None:
        return text
    low, high = measure["interval"]
    return f"{text} [{low:{form}}–{high:{form}}]"


def measure(value: Any) -> Mapping[str, Any]:
    """A measure as {"value", "interval"}, also where a result holds a plain number."""
    return value if isinstance(value, Mapping) else {"value": value, "interval": None}


def difference(found: Mapping[str, Any], form: str) -> str:
    """A difference with its sign, and its interval in brackets where it has one."""
    if found["value"] is None:
        return "–"
    text = f"{found['value']:+{form}}"
    low, high = found["interval"] or (None, None)
    return text if low is None else f"{text} [{low:+{form}} {high:+{form}}]"


def evaluated(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, tuple[str, ...], str]]]]:
    """What an evaluation measured: sections of (name, where each model's line has the measure, how its number is written)."""
    sets = list(result["validation"])
    one = list(result["models"].values())
    sections: list[tuple[str, list[tuple[str, tuple[str, ...], str]]]] = [
        ("bits/byte", [(name, ("bpb", name), ".3f") for name in sets]),
        ("tokens/word", [(name, ("fertility", name), ".2f") for name in sets]),
    ]
    for title, key in (("prompts", "generations"), ("answers", "answers")):
        found: dict[str, Any] = next((line[key] for line in one if key in line), {})
        sections.append((title, [(name, (key, measure), form) for measure, (name, form) in WRITTEN.items() if measure in found]))
    tasks: dict[str, Any] = next((line["tasks"] for line in one if "tasks" in line), {})
    sections.append(("", [(f"{task} {metric}", ("tasks", task, metric), ".3f") for task, metrics in tasks.items() for metric in metrics]))
    return [(title, rows) for title, rows in sections if rows]


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
