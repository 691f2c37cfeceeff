"""The report of a merge run: its models and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from azrecipe.report.html import Section, join_html, render_table
from azrecipe.report.number_format import format_number
from azrecipe.runs.reader import RunRecord


def collect_headline(run: RunRecord) -> dict[str, str]:
    """Collect the headline."""
    rows = run.result.get("rows") or {}
    return {
        "method": str(run.recipe.get("method") or ""),
        "models": ", ".join(map(str, run.recipe.get("models") or {})),
        "rows merged": format_number(rows.get("merged")) if rows else "",
        "rows kept": format_number(rows.get("kept")) if rows else "",
        "parameters": format_number(run.result.get("parameters")) if run.result else "",
    }


def build_sections(run: RunRecord) -> Iterator[Section]:
    """Build the sections of a merge run."""
    sources: Mapping[str, Any] = run.result.get("models") or {}
    entries: Mapping[str, Any] = run.recipe.get("models") or {}
    models = [[name, str(source.get("path", "")), _format_weights(name, entries)] for name, source in sources.items()]
    rows: Mapping[str, Any] = run.result.get("rows") or {}
    counts = [[name, format_number(count)] for name, count in rows.items()]
    tables = [render_table("Models", ["model", "path", "weight"], models), render_table("Rows of tokens", ["rows", "count"], counts)]
    yield Section("Merging", join_html(tables if models else []))


def _format_weights(name: str, entries: Mapping[str, Any]) -> str:
    """Format a model's weights as its recipe has them."""
    entry = entries.get(name)
    if not isinstance(entry, Mapping):
        return "base"
    groups = entry.get("weights")
    if isinstance(groups, Mapping):
        return ", ".join(f"{group}: {weight:g}" for group, weight in groups.items())
    weight = entry.get("weight")
    return f"{1 if weight is None else weight:g}"
