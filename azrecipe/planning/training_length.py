"""Knows how long a recipe's training loops are, and how often they go through their text, as far as that stands in the recipe and on this disk."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.data import readers
from azrecipe.errors import RecipeError
from azrecipe.planning.training_loops import Loop
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Phase, Pretrain, Sft
from azrecipe.runs.run_dir import run_of
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.paths import is_local_data

BYTES_PER_TOKEN = 4.0  # where no run has measured it; a custom vocabulary reads Azerbaijani at about 4.5, Llama 3's own at 2.2
_TAKEN = re.compile(r"\[:(\d+)\]$")  # split: "train[:2000]"
_PACKED = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0}  # text bytes for each on the disk, roughly


@dataclass(frozen=True)
class Amount:
    """Steps of a loop (None: not known), tokens in them, and for each source of known size how often it is gone through."""

    steps: int | None
    tokens: int | None
    epochs: dict[str, float]
    notes: tuple[str, ...]


def amounts(recipe: Recipe, runs_dir: Path, loops: Sequence[Loop]) -> list[Amount]:
    """For each loop of a pretrain or sft recipe."""
    config: Pretrain | Sft = recipe.config
    if isinstance(config, Sft):
        return [_tuned(recipe, loops[0])]
    rate, notes = _bytes_per_token(recipe, runs_dir)
    sizes = {source.path: size for source in config.data.datasets if (size := _size(recipe, source)) is not None}
    return [_pretrained(config, phase, loop, (rate, sizes, notes)) for phase, loop in zip(config.phases, loops, strict=True)]


def _pretrained(config: Pretrain, phase: Phase, loop: Loop, known: tuple[float, dict[str, int], list[str]]) -> Amount:
    rate, sizes, notes = known
    each = loop.global_batch_size * config.data.max_length
    said: list[str] = []
    steps: int
    if phase.max_steps is not None:
        steps = phase.max_steps
    elif phase.max_tokens is not None:
        steps = math.ceil(phase.max_tokens / each)
    elif phase.max_bytes is not None:
        steps = math.ceil(phase.max_bytes / rate / each)
        said = notes
    elif phase.num_train_epochs is not None and len(sizes) == len(config.data.datasets):
        steps = math.ceil(phase.num_train_epochs * sum(sizes.values()) / rate / each)
        said = notes
    else:
        return Amount(None, None, {}, (f"{phase.name}: how much text there is is not known here: azrecipe prepare tells",))
    tokens = steps * each
    weights = [source.weight for source in config.data.datasets]
    total = sum(weight or 0.0 for weight in weights)
    epochs = {}
    if config.data.sampling_temperature is None and total > 0:
        for source, weight in zip(config.data.datasets, weights, strict=True):
            if sizes.get(source.path):
                epochs[source.path] = tokens * rate * (weight or 0.0) / total / sizes[source.path]
    return Amount(steps, tokens, epochs, tuple(said if said or not epochs else notes))


def _tuned(recipe: Recipe, loop: Loop) -> Amount:
    """Of rows; each is reckoned as long as max_length lets it be."""
    config: Sft = recipe.config
    counts = [_rows(recipe, source) for source in config.data.datasets]
    if config.training.max_steps is not None:
        steps = config.training.max_steps
    elif any(count is None for count in counts):
        return Amount(None, None, {}, ("the number of rows is not known here: azrecipe check counts them",))
    else:
        kept = 1 - config.data.validation.held_out.fraction
        rows = kept * sum(count or 0 for count in counts)
        steps = max(math.ceil(rows * (config.training.num_train_epochs or 1) / loop.global_batch_size), 1)
    note = "rows are reckoned at max_length: shorter ones, and packing, take less"
    return Amount(steps, steps * loop.global_batch_size * loop.pairs * config.data.max_length, {}, (note,))


def _bytes_per_token(recipe: Recipe, runs_dir: Path) -> tuple[float, list[str]]:
    """Of the target text, by the tokenizer's run if it has one."""
    asked: Any = recipe.config.tokenizer
    if asked.output_of is not None:
        result = read_json(run_of(recipe, runs_dir, Path(asked.output_of).stem).path / "result.json") or {}
        name = asked.candidate or result.get("selected")
        for candidate in result.get("candidates", []):
            if candidate["name"] == name:
                return float(next(iter(candidate["bytes_per_token"].values()))["value"]), []
    return BYTES_PER_TOKEN, [f"{BYTES_PER_TOKEN:g} bytes of text a token are assumed: no tokenizer's run has measured it"]


def _size(recipe: Recipe, source: Any) -> int | None:
    """Bytes of text in a source, about; None where only reading it tells."""
    if not is_local_data(source.path):
        return source.max_bytes if getattr(source, "max_bytes", None) else None
    try:
        files = readers.files(readers.Located(source, recipe.place("data", "datasets")))
    except RecipeError:
        return None
    size = sum(Path(file.path).stat().st_size * _PACKED.get(Path(file.path).suffix, 1.0) for file in files if Path(file.path).exists())
    limit = getattr(source, "max_bytes", None)
    return int(min(size, limit) if limit else size)


def _rows(recipe: Recipe, source: Any) -> int | None:
    taken = _TAKEN.search(source.split or "")
    limit = int(taken[1]) if taken else None
    if is_local_data(source.path):
        try:
            files = readers.files(readers.Located(source, recipe.place("data", "datasets")))
        except RecipeError:
            return limit
        paths = [Path(file.path) for file in files]
        if all(path.suffix == ".jsonl" and path.is_file() for path in paths):
            count = sum(sum(1 for line in path.open("rb") if line.strip()) for path in paths)
            return min(count, limit) if limit else count
    return limit
