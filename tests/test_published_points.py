"""Published points: the file is complete, and a reader of it refuses an incomplete or contradictory point with its place."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from azrecipe.errors import RecipeError
from tests.conftest import ROOT

COMPLETE = """\
sources:
  paper: {url: https://example.org, date: 2024-05, about: a table, assumed: nothing}
models:
  tiny: {model_type: llama, vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 2}
points:
  - name: first
    source: paper
    hardware: {card: a100-80g, cards: 2}
    model: tiny
    method: lora
    execution: eager
    run: {precision: bf16_pure, strategy: fsdp2, shards: 2, optimizer: adamw_torch, attention: sdpa}
    lora: {r: 8, alpha: 16, dropout: 0.0, target_modules: [q_proj]}
    batch: {sequences: 4, tokens: 128, accumulation: 1}
    tokens_per_second: 1234.5
"""


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("published_points")


def test_the_shipped_points_are_complete_and_of_many_sources(reader: ModuleType) -> None:
    points = reader.read_points()
    counted = [point for point in points if point.beyond_plan is None]
    assert len(counted) >= 40
    by_source = Counter(point.source for point in points)
    assert set(by_source) == set(reader.read_sources()), "every source has a point"
    assert {point.method for point in counted} == {"full", "lora", "qlora"}
    for source in reader.read_sources().values():
        assert source["url"].startswith("https://")


def test_a_point_says_what_ran(reader: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "points.yaml"
    path.write_text(COMPLETE, encoding="utf-8")
    (point,) = reader.read_points(path)
    assert (point.card, point.cards, point.machines, point.kind) == ("a100-80g", 2, 1, "lora, eager")
    assert (point.step.shards, point.step.lora.r, point.step.quantized, point.step.head) == (2, 8, False, "logits")
    assert (point.batch, point.length, point.tokens_per_second, point.memory_bytes) == (4, 128, 1234.5, None)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    batch: {sequences: 4, tokens: 128, accumulation: 1}\n", "", "points.yaml:6:5: missing key 'batch' of a point"),
        ("accumulation: 1", "accumulate: 1", "points.yaml:14:40: unknown key 'accumulate'; did you mean 'accumulation'?"),
        (", date: 2024-05", "", "points.yaml:2:3: missing key 'date' of a source"),
        ("    tokens_per_second: 1234.5\n", "", "a point has tokens_per_second or memory"),
        ("1234.5", "-3", "points.yaml:15:24: tokens_per_second must be above 0"),
        ("1234.5", "fast", "tokens_per_second has another type"),
        ("card: a100-80g", "card: a100-80h", "there is no card 'a100-80h'; did you mean 'a100-80g'?"),
        ("source: paper", "source: blog", "there is no source 'blog'"),
        ("model: tiny", "model: huge", "there is no model 'huge'"),
        ("method: lora", "method: full", "lora belongs to the methods lora and qlora"),
        ("shards: 2", "shards: 4", "shards: 4 does not go with strategy: fsdp2 on 2 cards"),
        ("cards: 2", "cards: 2, machines: 2", "several machines have network_gbit_per_s"),
        ("strategy: fsdp2, shards: 2", "strategy: single, shards: 1", "strategy: single does not go with 2 cards"),
        ("precision: bf16_pure", "precision: bf16", "points.yaml:12:22: precision is one of bf16_mixed, bf16_pure, float32"),
    ],
)
def test_an_incomplete_point_is_refused_at_its_place(reader: ModuleType, tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "points.yaml"
    assert old in COMPLETE
    path.write_text(COMPLETE.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        reader.read_points(path)
    assert expected in str(caught.value)
