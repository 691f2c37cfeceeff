"""The merge step of a model card, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from azrecipe.runs.reader import RunRecord


def render_merge(step: RunRecord) -> str:
    """Render what was merged, and how."""
    entries: Mapping[str, Any] = step.recipe["models"]
    rows = [[name, _format_merged_source(entry), _format_merge_weight(entry)] for name, entry in entries.items()]
    if step.recipe.get("base"):
        rows.append(["base", _format_merged_source(step.recipe["base"]), "–"])
    counts = step.result["rows"]
    note = (
        f"Method: {step.result['method']}. Of the rows of tokens, {counts['merged']:,} were merged, {counts['special']:,} copied "
        f"from {step.recipe.get('special_tokens_from') or 'no model'} and {counts['kept']:,} kept from {step.result['tokenizer_of']}."
    )
    return f"{render_table(['model', 'source', 'weight'], rows)}\n\n{note}"


def _format_merged_source(entry: Mapping[str, Any]) -> str:
    """Format where a merged model comes from, without private parts of local paths."""
    if entry.get("output_of"):
        return f"`{Path(entry['output_of']).stem}`"
    path = str(entry["name_or_path"])
    return f"`{Path(path).name}` (a local folder)" if is_local_path(path) else f"[{path}](https://huggingface.co/{path})"


def _format_merge_weight(entry: Mapping[str, Any]) -> str:
    groups = entry.get("weights")
    if groups:
        return ", ".join(f"{group}: {weight:g}" for group, weight in groups.items())
    weight = entry.get("weight")
    return f"{1 if weight is None else weight:g}"


def is_local_path(value: Any) -> bool:
    """Whether a value is or contains a local path."""
    if isinstance(value, Mapping):
        return any(map(is_local_path, value.values()))
    return isinstance(value, str) and value.startswith(("/", "./", "../", "~"))


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in [columns, *rows]]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])
