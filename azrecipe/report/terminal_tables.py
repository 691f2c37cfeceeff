"""Run directories as tables in a terminal. Knows how a number is shown; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from azrecipe.recipe.load import Recipe
from azrecipe.report import estimate_section, number_format
from azrecipe.runs.reader import Run
from azrecipe.runs.run_dir import locate

SAMPLE = 110  # characters of a generation that a table shows


def show_run(recipe: Recipe, runs_dir: Path) -> None:
    """The headline of one finished run, on stdout."""
    place = locate(recipe, runs_dir).path
    result = _result(place)
    if result:
        {"tokenizer": _tokenizer, "pretrain": _pretrain, "sft": _sft, "evaluate": _evaluate}[recipe.stage](result)
        _foreseen(Run(place, recipe.name))


def show_pipeline(pipeline: Recipe, recipes: Sequence[Recipe], runs_dir: Path) -> None:
    """The end of a pipeline, or of one cell of it: the last evaluation where there is one, or a table for each step."""
    for cell in {recipe.cell.name for recipe in recipes if recipe.cell}:
        _console().print(f"\ncell {cell}")
    for recipe in reversed(recipes):
        if recipe.stage == "evaluate" and (result := _result(locate(recipe, runs_dir).path)):
            _evaluate(result, title=pipeline.data.get("description") or pipeline.name)
            return
    for recipe in recipes:
        show_run(recipe, runs_dir)


def show_comparison(result: Mapping[str, Any], title: str) -> None:
    """A matrix' cells ranked, what each has read and cost, and the cells that are not finished."""
    rows, console = result["ranking"], _console()
    points, sets = number_format.axes(result)
    table = Table(title=f"{title}: bits per byte, ranked on {result['dataset']}", caption=result["definitions"]["bpb"])
    table.add_column("cell")
    for name in ("vocabulary", "parameters", *(f"{name}\n{point}" for name in sets for point in points)):
        table.add_column(name, justify="right")
    for row in rows:
        found = [row["bpb_after"].get(point, {}).get(name) for name in sets for point in points]
        sizes = [number_format.number(row["vocab_size"]), number_format.number(row["parameters"])]
        table.add_row(row["cell"], *sizes, *("" if value is None else f"{value:.3f}" for value in found))
    costs = Table(title="What they read and cost", caption=result["definitions"]["training_seconds"])
    costs.add_column("cell")
    priced = any("price" in row for row in rows)
    for name in ("bytes read", "tokens", "steps", "tokens/s", "bytes/s", "hours", *(["price"] if priced else []), ""):
        costs.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[key]:,}" for key in ("bytes", "tokens", "steps")]
        cells += [f"{row[key]:,.0f}" for key in ("tokens_per_second", "bytes_per_second")] + [f"{row['training_seconds'] / 3600:,.3f}"]
        cells += [f"{row['price']:,.2f}"] if priced else []
        costs.add_row(row["cell"], *cells, "" if row["same_bytes"] else "not the same bytes")
    if rows:
        console.print(table)
        console.print(costs)
    for cell in result["unfinished"]:
        code = f", exit code {cell['exit_code']}" if cell["exit_code"] else ""
        console.print(f"{cell['cell']}: {cell['state']} ({cell['step']}{code}) {cell['message']}", markup=False)


def _result(run: Path) -> dict[str, Any]:
    file = run / "result.json"
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return loaded


def _console() -> Console:
    """Tables for a file or a pipe are as wide as they need to be, up to a line that a page can hold."""
    console = Console(highlight=False, markup=False)  # a user's words and a model's output may hold square brackets
    return console if console.is_terminal else Console(highlight=False, markup=False, width=140)


def _tokenizer(result: Mapping[str, Any]) -> None:
    first, *others = result["validation"]
    console = _console()
    table = Table(
        title=f"Tokenizers on held-out text: {first}", caption=f"{result['definitions']['fertility']}; [95 % interval]; ← selected"
    )
    table.add_column("candidate", no_wrap=True)
    table.add_column("tokens", justify="right")
    for title in number_format.MEASURES.values():
        table.add_column(title.format(window=f"{result['window']:,}"), justify="right")
    for line in result["candidates"]:
        mark = " ←" if line["name"] == result["selected"] else ""
        cells = [number_format.short(line[key][first], key) for key in number_format.MEASURES if key != "fertility"]
        table.add_row(
            line["name"] + mark, number_format.number(line["vocab_size"]), number_format.with_interval(line["fertility"][first]), *cells
        )
    console.print(table)
    costs = Table(title="What they cost")
    parity = "parity" in result["candidates"][0]
    costs.add_column("candidate", no_wrap=True)
    for name in others:
        costs.add_column(f"tokens/word\n{name}", justify="right")
        costs.add_column(f"tokens vs. base\n{name}", justify="right")
    for title in [*(["parity with\nEnglish"] if parity else []), "embedding\nparameters", "unused\ntokens", "encoding\nMB/s"]:
        costs.add_column(title, justify="right")
    for line in result["candidates"]:
        cells = [
            cell
            for n in others
            for cell in (
                number_format.short(line["fertility"][n]),
                number_format.with_interval(line["tokens_vs_baseline"][n], "tokens_vs_baseline"),
            )
        ]
        cells += [number_format.with_interval(line["parity"])] if parity else []
        added = line["embedding_parameters_added"]
        rows = f"{number_format.number(line['embedding_rows_added'], sign=True)} rows"
        cells += [number_format.number(added, sign=True) if added is not None else rows, f"{line['unused_tokens']['share']:.0%}"]
        costs.add_row(line["name"], *cells, f"{line['encoding']['bytes_per_second'] / 1e6:.1f}")
    console.print(costs)
    if result["show_words"]:
        words = Table(title="How words are cut", caption="| the pre-tokenizer cuts, · only the merges do")
        words.add_column("candidate", no_wrap=True)
        for word in result["show_words"]:
            words.add_column(word, overflow="fold")
        for line in result["candidates"]:
            words.add_row(line["name"], *("|".join("·".join(piece) for piece in cut) for cut in line["words"]))
        console.print(words)


def _pretrain(result: Mapping[str, Any]) -> None:
    sets = list(next(iter(result["bpb"].values())))
    table = Table(title="Bits per byte on held-out text", caption=result["definitions"]["bpb"])
    table.add_column("after")
    for name in sets:
        table.add_column(name, justify="right")
    table.add_column("steps", justify="right")
    table.add_column("bytes read", justify="right")
    for stage, values in result["bpb"].items():
        phase = result["phases"].get(stage, {})
        cells = [f"{values[name]:.3f}" for name in sets]
        table.add_row(stage, *cells, f"{phase['steps']:,}" if phase else "", f"{phase['bytes']:,}" if phase else "")
    _console().print(table)


def _sft(result: Mapping[str, Any]) -> None:
    pairs = result.get("method") == "dpo"
    measures = {"accuracy": "held_out_accuracy", "margin": "held_out_margin"} if pairs else {"loss": "held_out_loss"}
    table = Table(title="Preferences" if pairs else "Instruction tuning")
    heads = [f"{name} {side}" for name in measures for side in ("before", "after")]
    for column in ("pairs" if pairs else "conversations", "held out", "dropped", "trained tokens", *heads):
        table.add_column(column, justify="right")
    values = [result[key][side] for key in measures.values() for side in ("before", "after")]
    data = result["data"]
    table.add_row(f"{data['train']:,}", f"{data['held_out']:,}", f"{data['dropped']:,}", f"{data['trained_tokens']:,}",
                  *("" if value is None else f"{value:.3f}" for value in values))  # fmt: skip
    _console().print(table)


def _foreseen(run: Run) -> None:
    """What training was to need and what it took, where that was foreseen."""
    table = Table(title="Foreseen and measured", caption="\n".join(estimate_section.notes(run)) or None)
    for nth, head in enumerate(estimate_section.HEADS):
        table.add_column(head, justify="right" if nth else "left")
    rows = estimate_section.rows(run)
    for row in rows:
        table.add_row(*row)
    if rows:
        _console().print(table)


def _evaluate(result: Mapping[str, Any], title: str = "Evaluation") -> None:
    models: Mapping[str, Any] = result["models"]
    console = _console()
    baseline = result.get("baseline", next(iter(models)))
    caption = f"[95 % interval]; below, Δ: the difference to {baseline} and its interval, resampled together"
    table = Table(title=title, caption=f"{result['definitions']['bpb']}\n{caption}")
    table.add_column("", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    table.add_row("parameters", *(f"{found['parameters']:,}" for found in models.values()), end_section=True)
    for section, rows in number_format.evaluated(result):
        for last, (name, keys, form) in enumerate(rows, 1 - len(rows)):
            cells = [_measured(found, keys, form) for found in models.values()]
            table.add_row(f"{section}, {name}".removeprefix(", "), *cells, end_section=last == 0)
    console.print(table)
    for nth, prompt in enumerate(result["prompts"]):
        samples = Table(title=f"Prompt: {prompt}", show_header=False, title_justify="left", expand=False)
        samples.add_column("model")
        samples.add_column("output", overflow="fold")
        for name, found in models.items():
            text = " ".join(found["samples"][nth]["output"].split())
            samples.add_row(name, text[:SAMPLE] + ("…" if len(text) > SAMPLE else ""))
        console.print(samples)


def _measured(line: Mapping[str, Any], keys: Sequence[str], form: str) -> str:
    """A model's measure, and below it its difference to the baseline."""
    found, apart = number_format.measure(_at(line, keys)), _at(line.get("difference", {}), keys)
    text = number_format.interval(found, form)
    return text if apart is None else f"{text}\nΔ {number_format.difference(apart, form)}"


def _at(value: Any, keys: Sequence[str]) -> Any:
    """What stands below these keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
