"""Knows how what was foreseen of a run (plan.json) stands beside what was measured in it (metrics.jsonl)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from azrecipe.report.html import Html, Part, joined, table, tag
from azrecipe.runs.reader import Run

GIB = 2**30
HEADS = ("", "peak of tensors, foreseen", "measured", "error", "tokens/s, foreseen", "measured", "error")
MEANS = (
    "Foreseen: before the weights were loaded, by the step's tensors and the card's roofline. Measured: the most that PyTorch had allocated on "
    "the main process' GPU since the loop began, evaluation and saving included; the median rate of the logged lines after the first. Error: "
    "foreseen against measured."
)
CPU = "On a CPU memory is not measured in a way that could be compared: the process' resident size holds its libraries too."
PADDED = "Rows are foreseen at max_length, and padding is no token in the measured rate: it is lower by as much as rows are shorter."


def part(run: Run) -> Part:
    """The table, and what is to be known of it; empty where nothing was foreseen."""
    found = rows(run)
    said = [MEANS, *notes(run)] if found else []
    caption = f"Needed for training, on {_where(run.foreseen)}" if found else ""
    return Part("Foreseen and measured", joined([table(caption, HEADS, found), tag("p", " ".join(said))]) if found else Html(""))


def notes(run: Run) -> list[str]:
    """What keeps the two from being compared as they stand."""
    told = [] if run.foreseen.get("card") else [CPU]
    data = run.recipe.get("data") or {}
    return [*told, PADDED] if run.stage == "sft" or not data.get("packing", True) else told


def rows(run: Run) -> list[list[str]]:
    """A line for each loop, its cells by HEADS."""
    return [_row(loop, run) for loop in run.foreseen.get("loops", [])]


def _row(loop: Mapping[str, Any], run: Run) -> list[str]:
    lines = [line for line in run.metrics if line.get("phase") == loop["name"] and "loss" in line]
    peak, rate = loop["memory"]["peak"], (loop.get("tokens_per_second") or {}).get("middle")
    memory = max((line.get("peak_memory_bytes") or 0 for line in lines), default=0) if run.foreseen.get("card") else 0
    speeds = [line["tokens_per_second"] for line in lines[1:] if line.get("tokens_per_second")]
    speed = statistics.median(speeds) if speeds else 0
    return [
        loop["name"],
        size(peak), size(memory) if memory else "–", _error(peak, memory),
        f"{rate:,.0f}" if rate else "–", f"{speed:,.0f}" if speed else "–", _error(rate, speed),
    ]  # fmt: skip


def _error(foreseen: float | None, measured: float) -> str:
    return f"{foreseen / measured - 1:+.1%}" if foreseen and measured else "–"


def size(value: float) -> str:
    """Bytes for people."""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / 2**20:.1f} MiB"


def _where(found: Mapping[str, Any]) -> str:
    processes, device = found.get("processes", 1), "a CPU" if found.get("device") == "cpu" else str(found.get("device"))
    return f"{processes} × {device}" if processes > 1 and found.get("card") else device
