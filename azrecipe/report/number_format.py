"""Names and formats of measured numbers, for terminal and pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from azrecipe.report.svg_plots import Point

PERCENT = ".1%"


class MeasureStyle(NamedTuple):
    """A measure's title and number format."""

    title: str
    format_spec: str


class EvaluationRow(NamedTuple):
    """A row of an evaluation's table."""

    name: str
    keys: tuple[str, ...]  # lead to the measure in a model's result
    format_spec: str


# Column titles of a held-out set's measures, in this order
MEASURE_HEADERS: Mapping[str, str] = {
    "fertility": "tokens/word",
    "bytes_per_token": "bytes/token",
    "words_in_window": "words in {window} tokens",
    "strr": "whole words",
    "continued_words": "continued words",
    "renyi_efficiency": "Rényi efficiency",
    "tokens_vs_baseline": "tokens vs. base",
}
# Measures of generated text, in this order
GENERATION_MEASURES: Mapping[str, MeasureStyle] = {
    "chrf": MeasureStyle("chrF", ".1f"),
    "chrf++": MeasureStyle("chrF++", ".1f"),
    "rouge_l": MeasureStyle("ROUGE-L", ".1f"),
    "language": MeasureStyle("language", ".0%"),
    "script": MeasureStyle("script", PERCENT),
    "repetition": MeasureStyle("repetition", PERCENT),
    "ended": MeasureStyle("ended", ".0%"),
    "words": MeasureStyle("words", ".1f"),
}
_FORMATS: Mapping[str, str] = {
    "words_in_window": ",.0f", "strr": PERCENT, "continued_words": PERCENT, "renyi_efficiency": ".3f", "tokens_vs_baseline": ".3f",
}  # fmt: skip


def format_number(value: float | None, sign: bool = False) -> str:
    """Format a whole number with separators; None is a dash."""
    return "–" if value is None else f"{value:{'+' if sign and value else ''},}"


def format_value(measure: Mapping[str, Any], key: str = "") -> str:
    """Format a measure's value without its interval."""
    return "–" if measure["value"] is None else f"{measure['value']:{_FORMATS.get(key, '.2f')}}"


def format_measure(measure: Mapping[str, Any], key: str = "") -> str:
    """Format a measure with its interval, in the format of its key."""
    return format_interval(measure, _FORMATS.get(key, ".2f"))


def format_interval(measure: Mapping[str, Any], format_spec: str) -> str:
    """Format a measure with its interval or standard error."""
    if measure["value"] is None:
        return "–"
    text = f"{measure['value']:{format_spec}}"
    if measure.get("stderr") is not None:
        return f"{text} ± {measure['stderr']:{format_spec}}"
    if measure.get("interval") is None:
        return text
    low, high = measure["interval"]
    return f"{text} [{low:{format_spec}}–{high:{format_spec}}]"


def to_measure(value: Any) -> Mapping[str, Any]:
    """Convert a plain number to a measure {"value", "interval"}."""
    return value if isinstance(value, Mapping) else {"value": value, "interval": None}


def format_difference(measure: Mapping[str, Any], format_spec: str) -> str:
    """Format a difference with its sign and interval."""
    if measure["value"] is None:
        return "–"
    text = f"{measure['value']:+{format_spec}}"
    low, high = measure["interval"] or (None, None)
    return text if low is None else f"{text} [{low:+{format_spec}} {high:+{format_spec}}]"


def list_evaluation_rows(result: Mapping[str, Any]) -> list[tuple[str, list[EvaluationRow]]]:
    """List what an evaluation measured, as sections of rows."""
    sets = list(result["validation"])
    models = list(result["models"].values())
    sections: list[tuple[str, list[EvaluationRow]]] = [
        ("bits/byte", [EvaluationRow(name, ("bpb", name), ".3f") for name in sets]),
        ("tokens/word", [EvaluationRow(name, ("fertility", name), ".2f") for name in sets]),
    ]
    for title, key in (("prompts", "generations"), ("answers", "answers")):
        measures: dict[str, Any] = next((model[key] for model in models if key in model), {})
        rows = [
            EvaluationRow(style.title, (key, measure), style.format_spec)
            for measure, style in GENERATION_MEASURES.items()
            if measure in measures
        ]
        sections.append((title, rows))
    tasks: dict[str, Any] = next((model["tasks"] for model in models if "tasks" in model), {})
    rows = [EvaluationRow(f"{task} {metric}", ("tasks", task, metric), ".3f") for task, metrics in tasks.items() for metric in metrics]
    sections.append(("", rows))
    return [(title, rows) for title, rows in sections if rows]


def collect_points(result: Mapping[str, Any], key: str = "fertility") -> dict[str, dict[str, list[Point]]]:
    """Collect a measure of tokenizers over vocabulary size.

    Returns:
        For each held-out set, the points of each family of candidates.
    """
    panels: dict[str, dict[str, list[Point]]] = {}
    for name in result["validation"]:
        panel = panels.setdefault(name, {})
        for line in result["candidates"]:
            measure = line[key][name]
            if measure["value"] is not None:
                panel.setdefault(_describe_family(line), []).append(
                    Point(line["name"], line["vocab_size"], measure["value"], measure["interval"])
                )
    return panels


def list_points_and_sets(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """List a matrix' points of training and held-out sets.

    The ranked set is the first.
    """
    rows = [row["bpb_after"] for row in result["ranking"]]
    points = list(dict.fromkeys(point for after in rows for point in after))
    sets = list(dict.fromkeys([result["dataset"], *(name for after in rows for values in after.values() for name in values)]))
    return points, sets


def _describe_family(line: Mapping[str, Any]) -> str:
    rules = line.get("pre_tokenizer", "base")
    protected = " (protected)" if line.get("protect") else ""
    return str(line["kind"]) + ("" if rules == "base" else f", {rules}") + protected
