"""The report of a matrix: ranking, cost and unfinished cells."""

from __future__ import annotations

from collections.abc import Iterator

from azrecipe.report.html import Section, join_html, render_definitions, render_details, render_table, tag
from azrecipe.report.number_format import format_number, list_points_and_sets
from azrecipe.runs.reader import RunRecord


def build_sections(run: RunRecord) -> Iterator[Section]:
    """Build the sections of a pipeline's matrix, from its result.json."""
    result = run.result
    if not result:
        return
    rows = result["ranking"]
    points, sets = list_points_and_sets(result)
    for name in sets:
        values = [[row["bpb_after"].get(point, {}).get(name) for point in points] for row in rows]
        cells = [
            [row["cell"], *("–" if value is None else f"{value:.3f}" for value in row_values)]
            for row, row_values in zip(rows, values, strict=True)
        ]
        caption = f"Cells ranked by bits per byte on {result['dataset']}, lowest first"
        yield Section(f"Bits per byte on {name}", render_table(caption, ["cell", *points], cells))
    costs = {"vocabulary": "vocab_size", "parameters": "parameters", "bytes read": "bytes", "tokens": "tokens", "steps": "steps"}
    rates = {"tokens/s": "tokens_per_second", "bytes/s": "bytes_per_second"}
    priced = any("price" in row for row in rows)
    cells = [
        [
            row["cell"],
            *(format_number(row[key]) for key in costs.values()),
            *(f"{row[key]:,.0f}" for key in rates.values()),
            f"{row['training_seconds'] / 3600:,.3f}",
            *([f"{row['price']:,.2f}"] if priced else []),
            "" if row["same_bytes"] else "not the same bytes",
        ]
        for row in rows
    ]
    yield Section("What they read and cost", render_table("", ["cell", *costs, *rates, "hours", *(["price"] if priced else []), ""], cells))
    unfinished = [f"{cell['cell']}: {cell['state']} ({cell['step']}) {cell['message']}" for cell in result["unfinished"]]
    yield Section("Definitions", render_details("Definitions of the measures", render_definitions(result["definitions"])))
    yield Section("Not finished", join_html(tag("p", line) for line in unfinished))
