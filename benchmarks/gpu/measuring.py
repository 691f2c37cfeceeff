"""Stage 5: bits per byte on held-out documents of many lengths: what padding to multiples of 64 saves, and that it changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from project import open_job
from results import Results

DOCUMENTS = 200


def run(results: Results, recipe: Path, toy: bool) -> None:
    import torch

    held: list[Any] = []

    def measure(padded: int, attention: str) -> dict[str, Any]:
        if not held:
            sets = {"model.attn_implementation": "sdpa", "training.use_liger_kernel": False}
            held.extend(open_job(recipe, sets, "measuring"))
        return score(*held, padded=padded, attention=attention)

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "padded to 64": lambda: measure(64, "sdpa"),
        "padded to the longest (as shipped)": lambda: measure(1, "sdpa"),
        "padded to the longest, again": lambda: measure(1, "sdpa"),
        "padded to 64, varlen": lambda: measure(64, "varlen"),
    }
    for name, way in ways.items():
        if not results.measure("measuring", name, way):
            return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score(job: Any, model: Any, padded: int, attention: str) -> dict[str, Any]:
    """Seconds and the measure itself, in the form that the stage takes it in before training."""
    import torch

    from azrecipe.data import packing
    from azrecipe.evaluation import bits_per_byte

    before, packing.PADDED_MULTIPLE = packing.PADDED_MULTIPLE, padded
    model.set_attn_implementation(attention)
    texts = job.held_out["target"][:DOCUMENTS]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    try:
        with torch.autocast(model.device.type, torch.bfloat16):
            bits = bits_per_byte.score_texts(
                model, job.tokenizer, texts, job.config.data.max_length, job.config.training.per_device_eval_batch_size
            )
    finally:
        packing.PADDED_MULTIPLE = before
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "bits_per_byte": round(bits.bits_per_byte, 6), "took": round(time.monotonic() - begun, 2), "bytes": bits.num_bytes, "peak_gb": round(peak / 1e9, 2)
    }  # fmt: skip
