"""The estimate of a run (plan.json) beside its measurements (metrics.jsonl)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from azrecipe.report.html import Html, Section, join_html, render_table, tag
from azrecipe.runs.reader import RunRecord
from azrecipe.utils.console import format_bytes

HEADERS = ("", "peak of tensors, estimated", "measured", "error", "tokens/s, estimated", "measured", "error")
DEFINITIONS_NOTE = (
    "Estimated: before the weights were loaded, from the step's tensors and the GPU's roofline. Measured: the peak that PyTorch "
    "allocated on the main process' GPU since the start of the loop, with evaluation and saving; the median rate of the logged lines "
    "after the first. Error: estimated against measured."
)
CPU_NOTE = "On a CPU the measured memory is not comparable: the resident size of the process includes its libraries."
PADDING_NOTE = "The estimate takes rows of max_length. The measured rate counts no padding: it is lower where rows are shorter."


def build_section(run: RunRecord) -> Section:
    """Build the section; empty for a run without an estimate."""
    cells = build_rows(run)
    if not cells:
        return Section("Estimated and measured", Html(""))
    caption = f"Needed for training, on {_describe_hardware(run.plan)}"
    return Section(
        "Estimated and measured",
        join_html([render_table(caption, HEADERS, cells), tag("p", " ".join([DEFINITIONS_NOTE, *list_notes(run)]))]),
    )


def list_notes(run: RunRecord) -> list[str]:
    """List what makes estimate and measurement hard to compare."""
    lines = [] if run.plan.get("card") else [CPU_NOTE]
    data = run.recipe.get("data") or {}
    return [*lines, PADDING_NOTE] if run.stage == "sft" or not data.get("packing", True) else lines


def build_rows(run: RunRecord) -> list[list[str]]:
    """Build one row for each training loop, with the columns of HEADERS."""
    return [_build_row(loop, run) for loop in run.plan.get("loops", [])]


def _build_row(loop: Mapping[str, Any], run: RunRecord) -> list[str]:
    lines = [line for line in run.metrics if line.get("phase") == loop["name"] and "loss" in line]
    peak, rate = loop["memory"]["peak"], (loop.get("tokens_per_second") or {}).get("middle")
    memory = max((line.get("peak_memory_bytes") or 0 for line in lines), default=0) if run.plan.get("card") else 0
    speeds = [line["tokens_per_second"] for line in lines[1:] if line.get("tokens_per_second")]
    speed = statistics.median(speeds) if speeds else 0
    return [
        loop["name"],
        format_bytes(peak, 2), format_bytes(memory, 2) if memory else "–", _format_error(peak, memory),
        f"{rate:,.0f}" if rate else "–", f"{speed:,.0f}" if speed else "–", _format_error(rate, speed),
    ]  # fmt: skip


def _format_error(estimate: float | None, measured: float) -> str:
    return f"{estimate / measured - 1:+.1%}" if estimate and measured else "–"


def _describe_hardware(estimate: Mapping[str, Any]) -> str:
    processes, device = estimate.get("processes", 1), "a CPU" if estimate.get("device") == "cpu" else str(estimate.get("device"))
    return f"{processes} × {device}" if processes > 1 and estimate.get("card") else device
