"""Knows how a line of metrics.jsonl is said in a job's log, and which expressions make CloudWatch's metrics of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from azrecipe.recipe.load import Recipe

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
    "eval:loss": "eval_loss",
}
MOST = 40  # metric definitions that a job may have


def definitions(recipe: Recipe) -> list[dict[str, str]]:
    """MetricDefinitions of CreateTrainingJob: a name, and an expression with one group, which is a number. Bits per byte of each validation set too."""
    validation = recipe.data.get("data", {}).get("validation")
    sets = {f"eval:bits_per_byte_{name}": f"eval_{name}_bpb" for name in validation} if isinstance(validation, Mapping) else {}
    found = {**METRICS, **sets} if recipe.stage in ("pretrain", "sft") else {}
    return [{"Name": name, "Regex": rf"{PREFIX} .*\b{key}={NUMBER}(?:\s|$)"} for name, key in list(found.items())[:MOST]]


def said(line: str) -> str | None:
    """A line of metrics.jsonl as the log has it: `azrecipe-metrics phase=embeddings step=20 loss=3.1 …`; None for a line that is torn."""
    try:
        data: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    if isinstance(data.get("peak_memory_bytes"), int):
        data["peak_memory_gib"] = round(data["peak_memory_bytes"] / 2**30, 3)
    parts = [
        f"{key}={value}"
        for key, value in data.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool) and value != ""
    ]
    return f"{PREFIX} {' '.join(parts)}"
