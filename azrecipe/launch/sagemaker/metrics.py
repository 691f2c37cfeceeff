"""Knows how a line of metrics.jsonl is said in a job's log, and which expressions make CloudWatch's metrics of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PREFIX = "azrecipe-metrics"
NUMBER = r"([-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
# By the name in CloudWatch: the key in metrics.jsonl
METRICS: Mapping[str, str] = {
    "train:loss": "loss",
    "train:bits_per_byte": "train_bpb",
    "train:learning_rate": "learning_rate",
    "train:grad_norm": "grad_norm",
    "train:tokens_per_second": "tokens_per_second",
    "train:tokens": "tokens",
    "train:mfu": "mfu",
    "train:peak_memory_gib": "peak_memory_gib",
    "train:step": "step",
    "eval:bits_per_byte": "eval_target_bpb",
    "eval:loss": "eval_loss",
}


def definitions() -> list[dict[str, str]]:
    """MetricDefinitions of CreateTrainingJob: a name, and an expression with one group, which is a number."""
    return [{"Name": name, "Regex": rf"{PREFIX} .*\b{key}={NUMBER}(?:\s|$)"} for name, key in METRICS.items()]


def said(line: str) -> str | None:
    """A line of metrics.jsonl as the log has it: `azrecipe-metrics phase=embeddings step=20 loss=3.1 …`; None for a line that is torn."""
    try:
        data: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    if isinstance(data.get("peak_memory_bytes"), int):
        data["peak_memory_gib"] = round(data["peak_memory_bytes"] / 2**30, 3)
    parts = [f"{key}={value}" for key, value in data.items() if isinstance(value, int | float | str) and not isinstance(value, bool) and value != ""]
    return f"{PREFIX} {' '.join(parts)}"
