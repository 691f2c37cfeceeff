"""The report of a run's recipe and its differences."""

from __future__ import annotations

import json
from typing import Any

from azrecipe.report.html import Html, Section, join_html, render_details, render_table, tag
from azrecipe.runs.reader import RunRecord


def build_section(run: RunRecord) -> Section:
    """Build the section of a run's recipe."""
    text = render_details("The whole recipe, as resolved", tag("pre", run.recipe_text) if run.recipe_text else Html(""))
    return Section("Recipe", join_html([render_differences(run), text]))


def render_description(run: RunRecord) -> Html:
    """Render the description that a recipe has."""
    description = run.recipe.get("description")
    return tag("p", description) if description else Html("")


def render_differences(run: RunRecord) -> Html:
    """Render the differences from the file that the recipe extends.

    A recipe that extends none is compared with its own file, without overrides.
    """
    diff = run.parent_diff
    if not diff.get("parent"):
        return Html("")
    extends_none = diff["parent"] == diff["file"]
    parent = f"{diff['file']} without overrides" if extends_none else f"{diff['parent']}, which it extends"
    rows = [
        [
            row["key"],
            format_recipe_value(row["value"]) if "value" in row else "removed",
            format_recipe_value(row["parent"]) if "parent" in row else "not set",
            row["place"] or "–",
        ]
        for row in diff["differences"]
    ]
    if not rows:
        return tag("p", f"{diff['file']}: no overrides." if extends_none else f"{diff['file']} changes nothing of {parent}.")
    return render_table(f"Differences from {parent}", ["key", "here", "there", "written in"], rows)


def format_recipe_value(value: Any) -> str:
    """Format a recipe's value in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
