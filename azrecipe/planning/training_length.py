"""How long a recipe's training loops are: steps, tokens, epochs.

Only the recipe and this disk are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.data import readers
from azrecipe.errors import RecipeError
from azrecipe.planning.training_loops import PlannedLoop
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Phase, PretrainConfig, SftConfig, Source, ValidationSource
from azrecipe.runs.run_dir import locate_named_run
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.paths import is_local_data

BYTES_PER_TOKEN = 4.0  # where no run has measured it; for Azerbaijani, a custom vocabulary has about 4.5, Llama 3's 2.2
_SPLIT_LIMIT = re.compile(r"\[:(\d+)\]$")  # split: "train[:2000]"
_COMPRESSION = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0}  # bytes of text for a byte on the disk, roughly


@dataclass(frozen=True)
class TrainingLength:
    """The length of a loop; None where it is not known.

    epochs: passes over each source of known size.
    """

    steps: int | None
    tokens: int | None
    epochs: dict[str, float]
    notes: tuple[str, ...]


def estimate_training_lengths(recipe: Recipe, runs_dir: Path, loops: Sequence[PlannedLoop]) -> list[TrainingLength]:
    """Estimate the length of each loop of a pretrain or sft recipe."""
    config: PretrainConfig | SftConfig = recipe.config
    if isinstance(config, SftConfig):
        return [_estimate_finetuning(recipe, loops[0])]
    bytes_per_token, notes = _read_bytes_per_token(recipe, runs_dir)
    sizes = {source.path: size for source in config.data.datasets if (size := _estimate_source_bytes(recipe, source)) is not None}
    corpus = _Corpus(bytes_per_token, sizes, notes)
    return [_estimate_phase(config, phase, loop, corpus) for phase, loop in zip(config.phases, loops, strict=True)]


@dataclass(frozen=True)
class _Corpus:
    """A corpus: bytes per token, bytes of each source, and assumptions."""

    bytes_per_token: float
    sizes: dict[str, int]
    notes: tuple[str, ...]


def _estimate_phase(config: PretrainConfig, phase: Phase, loop: PlannedLoop, corpus: _Corpus) -> TrainingLength:
    step_tokens = loop.global_batch_size * config.data.max_length
    sizes, bytes_per_token = corpus.sizes, corpus.bytes_per_token
    notes: tuple[str, ...] = ()
    steps: int
    if phase.max_steps is not None:
        steps = phase.max_steps
    elif phase.max_tokens is not None:
        steps = math.ceil(phase.max_tokens / step_tokens)
    elif phase.max_bytes is not None:
        steps = math.ceil(phase.max_bytes / bytes_per_token / step_tokens)
        notes = corpus.notes
    elif phase.num_train_epochs is not None and len(sizes) == len(config.data.datasets):
        steps = math.ceil(phase.num_train_epochs * sum(sizes.values()) / bytes_per_token / step_tokens)
        notes = corpus.notes
    else:
        return TrainingLength(None, None, {}, (f"{phase.name}: the amount of text is not known here: azrecipe prepare counts it",))
    tokens = steps * step_tokens
    weights = config.list_weights(phase)
    total = sum(weights)
    epochs = {}
    if config.data.sampling_temperature is None and total > 0:
        for source, weight in zip(config.data.datasets, weights, strict=True):
            if sizes.get(source.path):
                epochs[source.path] = tokens * bytes_per_token * weight / total / sizes[source.path]
    return TrainingLength(steps, tokens, epochs, notes if notes or not epochs else corpus.notes)


def _estimate_finetuning(recipe: Recipe, loop: PlannedLoop) -> TrainingLength:
    """Estimate an sft loop; every row counts as max_length tokens."""
    config: SftConfig = recipe.config
    counts = [_count_rows(recipe, source) for source in config.data.datasets]
    if config.training.max_steps is not None:
        steps = config.training.max_steps
    elif any(count is None for count in counts):
        return TrainingLength(None, None, {}, ("the number of rows is not known here: azrecipe check counts them",))
    else:
        training_share = 1 - config.data.validation.held_out.fraction
        rows = training_share * sum(count or 0 for count in counts)
        steps = max(math.ceil(rows * (config.training.num_train_epochs or 1) / loop.global_batch_size), 1)
    note = "rows are counted as max_length tokens: shorter ones, and packing, need less"
    return TrainingLength(steps, steps * loop.global_batch_size * loop.pairs * config.data.max_length, {}, (note,))


def _read_bytes_per_token(recipe: Recipe, runs_dir: Path) -> tuple[float, tuple[str, ...]]:
    """Read the text's bytes per token from the tokenizer's run.

    Without such a run, return an assumption and a note on it.
    """
    tokenizer: Any = recipe.config.tokenizer
    if tokenizer.output_of is not None:
        result = read_json(locate_named_run(recipe, runs_dir, Path(tokenizer.output_of).stem).path / "result.json") or {}
        name = tokenizer.candidate or result.get("selected")
        for candidate in result.get("candidates", []):
            if candidate["name"] == name:
                return float(next(iter(candidate["bytes_per_token"].values()))["value"]), ()
    return BYTES_PER_TOKEN, (f"{BYTES_PER_TOKEN:g} bytes of text a token are assumed: no tokenizer's run has measured it",)


def _estimate_source_bytes(recipe: Recipe, source: Source) -> int | None:
    """Estimate a source's bytes of text; None where only reading tells."""
    limit = source.max_bytes if isinstance(source, ValidationSource) else None
    if not is_local_data(source.path):
        return limit or None
    try:
        files = readers.list_files(readers.DataSource(source, recipe.locate("data", "datasets")))
    except RecipeError:
        return None
    size = sum(Path(file.path).stat().st_size * _COMPRESSION.get(Path(file.path).suffix, 1.0) for file in files if Path(file.path).exists())
    return int(min(size, limit) if limit else size)


def _count_rows(recipe: Recipe, source: Any) -> int | None:
    """Count a source's rows; None where only reading tells."""
    match = _SPLIT_LIMIT.search(source.split or "")
    limit = int(match[1]) if match else None
    if is_local_data(source.path):
        try:
            files = readers.list_files(readers.DataSource(source, recipe.locate("data", "datasets")))
        except RecipeError:
            return limit
        paths = [Path(file.path) for file in files]
        if all(path.suffix == ".jsonl" and path.is_file() for path in paths):
            count = sum(sum(1 for line in path.open("rb") if line.strip()) for path in paths)
            return min(count, limit) if limit else count
    return limit
