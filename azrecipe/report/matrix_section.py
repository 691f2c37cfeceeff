"""Knows how a page shows a comparison of a matrix' cells: ranked, what each read and cost, and those that are not finished."""

from __future__ import annotations

from collections.abc import Iterator

from azrecipe.report.html import Part, definitions, folded, joined, table, tag
from azrecipe.report.number_format import axes, number
from azrecipe.runs.reader import Run


def parts(run: Run) -> Iterator[Part]:
    """The comparison in a pipeline's result.json."""
    result = run.result
    if not result:
        return
    rows = result["ranking"]
    points, sets = axes(result)
    for name in sets:
        values = [[row["bpb_after"].get(point, {}).get(name) for point in points] for row in rows]
        cells = [[row["cell"], *("–" if v is None else f"{v:.3f}" for v in value)] for row, value in zip(rows, values, strict=True)]
        caption = f"Cells ranked by bits per byte on {result['dataset']}, lowest first"
        yield Part(f"Bits per byte on {name}", table(caption, ["cell", *points], cells))
    costs = {"vocabulary": "vocab_size", "parameters": "parameters", "bytes read": "bytes", "tokens": "tokens", "steps": "steps"}
    rates = {"tokens/s": "tokens_per_second", "bytes/s": "bytes_per_second"}
    priced = any("price" in row for row in rows)
    cells = [
        [row["cell"], *(number(row[key]) for key in costs.values()), *(f"{row[key]:,.0f}" for key in rates.values()), f"{row['training_seconds'] / 3600:,.3f}",
         *([f"{row['price']:,.2f}"] if priced else []), "" if row["same_bytes"] else "not the same bytes"]
        for row in rows
    ]  # fmt: skip
    yield Part("What they read and cost", table("", ["cell", *costs, *rates, "hours", *(["price"] if priced else []), ""], cells))
    unfinished = [f"{cell['cell']}: {cell['state']} ({cell['step']}) {cell['message']}" for cell in result["unfinished"]]
    yield Part("Definitions", folded("What the measures mean", definitions(result["definitions"])))
    yield Part("Not finished", joined(tag("p", said) for said in unfinished))
