"""Knows how a page tells what was asked of a run: the recipe as resolved, and how it differs from its parent."""

from __future__ import annotations

import json
from typing import Any

from azrecipe.report.html import Html, Part, folded, joined, table, tag
from azrecipe.runs.reader import Run


def part(run: Run) -> Part:
    """The recipe of one run."""
    pieces = [differences(run)]
    pieces.append(folded("The whole recipe, as resolved", tag("pre", run.recipe_text) if run.recipe_text else Html("")))
    return Part("What was asked", joined(pieces))


def described(run: Run) -> Html:
    """What the recipe says of itself."""
    said = run.recipe.get("description")
    return tag("p", said) if said else Html("")


def differences(run: Run) -> Html:
    """How the recipe differs from the file that it extends, or from its own file as it stands."""
    told = run.parent
    if not told.get("parent"):
        return Html("")
    own = told["parent"] == told["file"]
    parent = f"{told['file']} as it stands" if own else f"{told['parent']}, which it extends"
    rows = [
        [found["key"], shown(found["value"]) if "value" in found else "taken away", shown(found["parent"]) if "parent" in found else "not set",
         found["place"] or "–"]
        for found in told["differences"]
    ]  # fmt: skip
    if not rows:
        return tag("p", f"{told['file']}: nothing in it was changed." if own else f"{told['file']} changes nothing of {parent}.")
    return table(f"{'What was changed of' if own else 'Differences from'} {parent}", ["key", "here", "there", "written in"], rows)


def shown(value: Any) -> str:
    """A recipe's value in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
