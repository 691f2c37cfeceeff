"""How long a planned training is: counted from data that lies in another folder than the current one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from azrecipe.distributed.backend import Backend
from azrecipe.planning.model_config import ModelShape
from azrecipe.planning.training_length import BYTES_PER_TOKEN, estimate_training_lengths
from azrecipe.planning.training_loops import plan_loops
from azrecipe.recipe.load import load_recipe
from tests.conftest import jsonl, write

MODEL = ModelShape({"model_type": "llama", "vocab_size": 2000}, 0, ())
ONE_PROCESS = Backend("single", 1, 0)
PRETRAIN = """
stage: pretrain
project: p
model: {{config: {{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 4096}}}}
tokenizer: {{family: llama3, vocab_size: 2000}}
data: {{max_length: 64, datasets: [{{path: {path}}}], validation: {{target: {{path: {path}}}}}}}
phases: [{{name: all, trainable_parameters: [all], learning_rate: 1e-3, num_train_epochs: 2}}]
training: {{global_batch_size: 4, per_device_train_batch_size: 4, precision: float32}}
"""
MIXED = """
stage: pretrain
project: p
model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 4096}}
tokenizer: {family: llama3, vocab_size: 2000}
data: {max_length: 64, datasets: [{path: a.jsonl, id: a, weight: 3}, {path: b.jsonl, id: b}], validation: {target: {path: a.jsonl}}}
phases:
  - {name: one, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 30}
  - {name: two, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 10, data: {weights: {a: 0, b: 1}}}
training: {global_batch_size: 4, per_device_train_batch_size: 4, precision: float32}
"""
SFT = """
stage: sft
project: p
model: {{name_or_path: ./model}}
data: {{max_length: 64, datasets: [{{path: {path}}}], validation: {{held_out: {{fraction: 0.25}}}}}}
training: {{num_train_epochs: 2, learning_rate: 1e-3, global_batch_size: 4, per_device_train_batch_size: 4, precision: float32}}
"""


@pytest.mark.parametrize("path", ["./text.jsonl", "./data/text.jsonl", "./data", "../elsewhere/text.jsonl", "./data/*.jsonl"])
def test_text_in_any_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    file = write(
        "data/text.jsonl" if "*" in path or path == "./data" else path, json.dumps({"text": "Bir varmış, bir yoxmuş. " * 500}) + "\n"
    )
    recipe = load_recipe(write("r.yaml", PRETRAIN.format(path=path)))
    (length,) = estimate_training_lengths(recipe, Path("runs"), plan_loops(recipe, MODEL, ONE_PROCESS))
    assert length.steps == math.ceil(2 * file.stat().st_size / BYTES_PER_TOKEN / (4 * 64)) > 0
    assert length.epochs[path] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("path", ["./rows.jsonl", "./data/rows.jsonl", "../elsewhere/rows.jsonl"])
def test_rows_in_any_folder_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write(path, jsonl(*({"messages": [{"role": "user", "content": "Salam"}, {"role": "assistant", "content": str(n)}]} for n in range(80))))
    recipe = load_recipe(write("r.yaml", SFT.format(path=path)))
    (length,) = estimate_training_lengths(recipe, Path("runs"), plan_loops(recipe, MODEL, ONE_PROCESS))
    assert length.steps == math.ceil(0.75 * 80 * 2 / 4)


def test_a_phase_reads_by_its_own_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", jsonl(*({"text": "kitab " * 50} for _ in range(20))))
    recipe = load_recipe(write(tmp_path / "mixed.yaml", MIXED))
    one, two = estimate_training_lengths(recipe, tmp_path, plan_loops(recipe, MODEL, ONE_PROCESS))
    a, b = (source.path for source in recipe.config.data.datasets)
    assert one.epochs[a] == pytest.approx(3 * one.epochs[b])
    assert two.epochs[a] == 0
    assert two.epochs[b] == pytest.approx(one.epochs[b] * 4 / 3)  # a third of the steps, all of them from b
