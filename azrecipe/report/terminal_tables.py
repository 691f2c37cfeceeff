"""Results of runs as tables in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from azrecipe.recipe.load import Recipe
from azrecipe.report import estimate_section, number_format
from azrecipe.runs.reader import RunRecord
from azrecipe.runs.run_dir import locate_run
from azrecipe.utils.rich_console import open_console

MAX_SAMPLE_LENGTH = 110  # characters of a generation


def show_run(recipe: Recipe, runs_dir: Path) -> None:
    """Print the headline of a finished run."""
    path = locate_run(recipe, runs_dir).path
    result = _read_result(path)
    if result:
        printers = {"tokenizer": _print_tokenizer, "pretrain": _print_pretrain, "sft": _print_sft, "merge": _print_merge}
        {**printers, "evaluate": _print_evaluate}[recipe.stage](result)
        _print_estimate(RunRecord(path, recipe.name))


def show_pipeline(pipeline: Recipe, recipes: Sequence[Recipe], runs_dir: Path) -> None:
    """Print a pipeline's last evaluation, or a table for each step."""
    for cell in {recipe.cell.name for recipe in recipes if recipe.cell}:
        open_console().print(f"\ncell {cell}")
    for recipe in reversed(recipes):
        if recipe.stage == "evaluate" and (result := _read_result(locate_run(recipe, runs_dir).path)):
            _print_evaluate(result, title=pipeline.data.get("description") or pipeline.name)
            return
    for recipe in recipes:
        show_run(recipe, runs_dir)


def show_comparison(result: Mapping[str, Any], title: str) -> None:
    """Print a matrix' ranking, its costs and its unfinished cells."""
    rows, console = result["ranking"], open_console()
    points, sets = number_format.list_points_and_sets(result)
    table = Table(title=f"{title}: bits per byte, ranked on {result['dataset']}", caption=result["definitions"]["bpb"])
    table.add_column("cell")
    for name in ("vocabulary", "parameters", *(f"{name}\n{point}" for name in sets for point in points)):
        table.add_column(name, justify="right")
    for row in rows:
        bits_per_byte = [row["bpb_after"].get(point, {}).get(name) for name in sets for point in points]
        sizes = [number_format.format_number(row["vocab_size"]), number_format.format_number(row["parameters"])]
        table.add_row(row["cell"], *sizes, *("" if value is None else f"{value:.3f}" for value in bits_per_byte))
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
        console.print(f"{cell['cell']}: {cell['state']} ({cell['step']}{code}) {cell['message']}")


def _read_result(run: Path) -> dict[str, Any]:
    file = run / "result.json"
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return loaded


def _print_tokenizer(result: Mapping[str, Any]) -> None:
    first, *others = result["validation"]
    console = open_console()
    table = Table(
        title=f"Tokenizers on held-out text: {first}", caption=f"{result['definitions']['fertility']}; [95 % interval]; ← selected"
    )
    table.add_column("candidate", no_wrap=True)
    table.add_column("tokens", justify="right")
    for title in number_format.MEASURE_HEADERS.values():
        table.add_column(title.format(window=f"{result['window']:,}"), justify="right")
    for line in result["candidates"]:
        mark = " ←" if line["name"] == result["selected"] else ""
        cells = [number_format.format_value(line[key][first], key) for key in number_format.MEASURE_HEADERS if key != "fertility"]
        table.add_row(
            line["name"] + mark,
            number_format.format_number(line["vocab_size"]),
            number_format.format_measure(line["fertility"][first]),
            *cells,
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
            for name in others
            for cell in (
                number_format.format_value(line["fertility"][name]),
                number_format.format_measure(line["tokens_vs_baseline"][name], "tokens_vs_baseline"),
            )
        ]
        cells += [number_format.format_measure(line["parity"])] if parity else []
        added = line["embedding_parameters_added"]
        rows = f"{number_format.format_number(line['embedding_rows_added'], sign=True)} rows"
        cells += [number_format.format_number(added, sign=True) if added is not None else rows, f"{line['unused_tokens']['share']:.0%}"]
        costs.add_row(line["name"], *cells, f"{line['encoding']['bytes_per_second'] / 1e6:.1f}")
    console.print(costs)
    if result["show_words"]:
        words = Table(title="How words are split", caption="| split of the pre-tokenizer, · split between tokens")
        words.add_column("candidate", no_wrap=True)
        for word in result["show_words"]:
            words.add_column(word, overflow="fold")
        for line in result["candidates"]:
            words.add_row(line["name"], *("|".join("·".join(piece) for piece in word) for word in line["words"]))
        console.print(words)


def _print_merge(result: Mapping[str, Any]) -> None:
    table = Table(title=f"Merged by {result['method']}: rows of tokens", caption=result["definitions"]["rows"])
    for name in result["rows"]:
        table.add_column(name, justify="right")
    table.add_row(*(number_format.format_number(count) for count in result["rows"].values()))
    open_console().print(table)


def _print_pretrain(result: Mapping[str, Any]) -> None:
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
    open_console().print(table)


def _print_sft(result: Mapping[str, Any]) -> None:
    is_dpo = result.get("method") == "dpo"
    measures = {"accuracy": "held_out_accuracy", "margin": "held_out_margin"} if is_dpo else {"loss": "held_out_loss"}
    table = Table(title="Preferences" if is_dpo else "Instruction tuning")
    heads = [f"{name} {side}" for name in measures for side in ("before", "after")]
    for column in ("pairs" if is_dpo else "conversations", "held out", "dropped", "trained tokens", *heads):
        table.add_column(column, justify="right")
    values = [result[key][side] for key in measures.values() for side in ("before", "after")]
    data = result["data"]
    table.add_row(f"{data['train']:,}", f"{data['held_out']:,}", f"{data['dropped']:,}", f"{data['trained_tokens']:,}",
                  *("" if value is None else f"{value:.3f}" for value in values))  # fmt: skip
    open_console().print(table)


def _print_estimate(run: RunRecord) -> None:
    """Print the estimate of a run beside its measurements."""
    table = Table(title="Estimated and measured", caption="\n".join(estimate_section.list_notes(run)) or None)
    for index, head in enumerate(estimate_section.HEADERS):
        table.add_column(head, justify="right" if index else "left")
    rows = estimate_section.build_rows(run)
    for row in rows:
        table.add_row(*row)
    if rows:
        open_console().print(table)


def _print_evaluate(result: Mapping[str, Any], title: str = "Evaluation") -> None:
    models: Mapping[str, Any] = result["models"]
    console = open_console()
    baseline = result.get("baseline", next(iter(models)))
    caption = f"[95 % interval]; below, Δ: the difference to {baseline} and its interval, resampled together"
    table = Table(title=title, caption=f"{result['definitions']['bpb']}\n{caption}")
    table.add_column("", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    table.add_row("parameters", *(f"{model['parameters']:,}" for model in models.values()), end_section=True)
    for section, rows in number_format.list_evaluation_rows(result):
        for row in rows:
            cells = [_format_measure(model, row.keys, row.format_spec) for model in models.values()]
            table.add_row(f"{section}, {row.name}".removeprefix(", "), *cells, end_section=row is rows[-1])
    console.print(table)
    for index, prompt in enumerate(result["prompts"]):
        samples = Table(title=f"Prompt: {prompt}", show_header=False, title_justify="left", expand=False)
        samples.add_column("model")
        samples.add_column("output", overflow="fold")
        for name, model in models.items():
            text = " ".join(model["samples"][index]["output"].split())
            samples.add_row(name, text[:MAX_SAMPLE_LENGTH] + ("…" if len(text) > MAX_SAMPLE_LENGTH else ""))
        console.print(samples)


def _format_measure(model: Mapping[str, Any], keys: Sequence[str], format_spec: str) -> str:
    """Format a model's measure, and below it its difference to the baseline."""
    text = number_format.format_interval(number_format.to_measure(_get(model, keys)), format_spec)
    difference = _get(model.get("difference", {}), keys)
    return text if difference is None else f"{text}\nΔ {number_format.format_difference(difference, format_spec)}"


def _get(value: Any, keys: Sequence[str]) -> Any:
    """Return the value below these keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
