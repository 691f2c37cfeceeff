"""CloudWatch metrics from a training job's log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from azrecipe.recipe.load import Recipe

LOG_PREFIX = "azrecipe-metrics"
NUMBER_PATTERN = r"([-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
# Keys of metrics.jsonl by the name in CloudWatch
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
MAX_METRIC_DEFINITIONS = 40  # SageMaker's limit for a job


def build_metric_definitions(recipe: Recipe) -> list[dict[str, str]]:
    """Build the MetricDefinitions of CreateTrainingJob.

    Each has a name and a regular expression with one group, which is a number. Every validation set has one for its bits per byte.
    """
    validation = recipe.data.get("data", {}).get("validation")
    sets = {f"eval:bits_per_byte_{name}": f"eval_{name}_bpb" for name in validation} if isinstance(validation, Mapping) else {}
    metrics = {**METRICS, **sets} if recipe.stage in ("pretrain", "sft") else {}
    return [
        {"Name": name, "Regex": rf"{LOG_PREFIX} .*\b{key}={NUMBER_PATTERN}(?:\s|$)"}
        for name, key in list(metrics.items())[:MAX_METRIC_DEFINITIONS]
    ]


def format_metrics_line(line: str) -> str | None:
    """Format a line of metrics.jsonl for the log.

    Returns:
        `azrecipe-metrics phase=embeddings step=20 loss=3.1 …`; None for an incomplete line.
    """
    try:
        data: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    if isinstance(data.get("peak_memory_bytes"), int):
        data["peak_memory_gib"] = round(data["peak_memory_bytes"] / 2**30, 3)
    pairs = [
        f"{key}={value}"
        for key, value in data.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool) and value != ""
    ]
    return f"{LOG_PREFIX} {' '.join(pairs)}"
