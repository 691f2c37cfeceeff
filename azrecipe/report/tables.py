"""Run directories as tables in a terminal. Knows how a number is shown; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from azrecipe.recipe.load import Recipe

SAMPLE = 110  # characters of a generation that a table shows


def show_run(recipe: Recipe, runs_dir: Path) -> None:
    """The headline of one finished run, on stdout."""
    result = _result(runs_dir / recipe.project / recipe.name)
    if result:
        {"tokenizer": _tokenizer, "pretrain": _pretrain, "sft": _sft, "evaluate": _evaluate}[recipe.stage](result)


def show_pipeline(pipeline: Recipe, recipes: Sequence[Recipe], runs_dir: Path) -> None:
    """The end of a pipeline: the last evaluation where there is one, or a line for each step."""
    for recipe in reversed(recipes):
        if recipe.stage == "evaluate" and (result := _result(runs_dir / pipeline.project / recipe.name)):
            _evaluate(result, title=pipeline.data.get("description") or pipeline.name)
            return
    for recipe in recipes:
        show_run(recipe, runs_dir)


def _result(run: Path) -> dict[str, Any]:
    file = run / "result.json"
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return loaded


def _console() -> Console:
    """Tables for a file or a pipe are as wide as they need to be, up to a line that a page can hold."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _tokenizer(result: Mapping[str, Any]) -> None:
    sets = list(result["validation"])
    table = Table(title="Tokenizers on held-out text", caption=result["definitions"]["fertility"])
    table.add_column("candidate")
    table.add_column("tokens", justify="right")
    for name in sets:
        table.add_column(f"fertility\n{name}", justify="right")
    for name in sets:
        table.add_column(f"bytes/token\n{name}", justify="right")
    for line in result["candidates"]:
        mark = " ← selected" if line["name"] == result["selected"] else ""
        cells = [f"{line['fertility'][n]:.2f}" for n in sets] + [f"{line['bytes_per_token'][n]:.2f}" for n in sets]
        table.add_row(line["name"] + mark, f"{line['vocab_size']:,}", *cells)
    _console().print(table)


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
    table = Table(title="Instruction tuning")
    for column in ("conversations", "held out", "dropped", "trained tokens", "loss before", "loss after"):
        table.add_column(column, justify="right")
    losses = [f"{result['held_out_loss'][key]:.3f}" if result["held_out_loss"][key] is not None else "" for key in ("before", "after")]
    data = result["data"]
    table.add_row(f"{data['train']:,}", f"{data['held_out']:,}", f"{data['dropped']:,}", f"{data['trained_tokens']:,}", *losses)
    _console().print(table)


def _evaluate(result: Mapping[str, Any], title: str = "Evaluation") -> None:
    models: Mapping[str, Any] = result["models"]
    sets = list(result["validation"])
    console = _console()
    table = Table(title=title, caption=result["definitions"]["bpb"])
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for name in sets:
        table.add_column(f"fertility\n{name}", justify="right")
    for name in sets:
        table.add_column(f"bits/byte\n{name}", justify="right")
    for name, found in models.items():
        cells = [f"{found['fertility'][n]:.2f}" for n in sets] + [f"{found['bpb'][n]:.3f}" for n in sets]
        table.add_row(name, f"{found['parameters']:,}", *cells)
    console.print(table)
    for nth, prompt in enumerate(result["prompts"]):
        samples = Table(title=f"Prompt: {prompt}", show_header=False, title_justify="left", expand=False)
        samples.add_column("model")
        samples.add_column("output", overflow="fold")
        for name, found in models.items():
            text = " ".join(found["samples"][nth]["output"].split())
            samples.add_row(name, text[:SAMPLE] + ("…" if len(text) > SAMPLE else ""))
        console.print(samples)
