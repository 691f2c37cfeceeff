"""Published points: the file is complete, and a reader of it refuses an incomplete or contradictory point with its place."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from azrecipe.errors import RecipeError
from azrecipe.planning.step_time import Span
from tests.conftest import ROOT
from tests.small import called

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


def make_prediction(reader: ModuleType, coverage: ModuleType, source: str, rate: float, **changes: Any) -> Any:
    """A step of one A100 whose roofline is 1,000 tokens a second, and which is planned at 800 (700 to 900)."""
    point = replace(
        reader.read_points()[0], name=f"{source} {rate:g}", source=source, tokens_per_second=rate, batch=1, length=1000, accumulation=1
    )
    values = {
        "rate": Span(700.0, 800.0, 900.0),
        "bottleneck": "compute",
        "roofline": 1.0,
        "links": 0.0,
        "peak": 96.0,
        "least": 97.0,
        "most": 110.0,
    }
    return coverage.Prediction(replace(point, memory_bytes=100, memory_of="reserved"), **(values | changes))


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("point_coverage")


def test_a_rate_is_predicted_from_other_sources_alone(reader: ModuleType, coverage: ModuleType) -> None:
    a, b, c = (make_prediction(reader, coverage, source, rate) for source, rate in (("a", 500.0), ("b", 600.0), ("c", 900.0)))
    found = coverage.leave_source_out([a, b, c])
    span, basis = found["a 500"]
    assert (span.low, span.middle, span.high, basis) == (
        pytest.approx(600),
        pytest.approx(750),
        pytest.approx(900),
        "chip, method, execution",
    )
    assert found["c 900"][0].middle == pytest.approx(550)
    assert coverage.leave_source_out([a]) == {}, "nobody else has run on this chip"
    bound = make_prediction(reader, coverage, "d", 100.0, bottleneck="links", links=10.0)
    assert coverage.leave_source_out([a, bound])["d 100"][0].middle == pytest.approx(100), "links hold it up"
    assert "a 500" not in coverage.leave_source_out([a, bound]), "a step that waits for links does not show what cards reach"


def test_coverage_counts_the_rates_and_peaks_that_the_ranges_hold(reader: ModuleType, coverage: ModuleType) -> None:
    inside, outside = (make_prediction(reader, coverage, "a", rate) for rate in (880.0, 1000.0))
    assert (inside.rate_inside, outside.rate_inside) == (True, False)
    assert outside.rate_error == pytest.approx(-0.2)
    assert inside.efficiency == pytest.approx(0.88)
    assert inside.memory_inside and inside.memory_error == pytest.approx(0.1), "reserved memory lies in the range around the tensors"
    allocated = replace(inside, point=replace(inside.point, memory_of="allocated"))
    assert allocated.memory_inside and allocated.memory_error == pytest.approx(-0.04), "allocated memory is that of the tensors, within 5 %"
    rates = [(p.rate, p.point.tokens_per_second) for p in (inside, outside)]
    assert coverage.summarize_rates(rates) == ("2", "1 (50%)", "-14.5%", "± 12%")
    assert coverage.summarize_rates([(inside.rate, None)])[0] == "0"


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    done = called([sys.executable, str(ROOT / "benchmarks" / "plan_published.py"), "--points", "litgtp"], tmp_path)
    assert done.code == 2
    assert "unknown sources: litgtp. Known: " in done.err and "litgpt" in done.err


@pytest.mark.long
def test_points_of_a_source_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = called([sys.executable, str(ROOT / "benchmarks" / "plan_published.py"), "--points", "peft-metamath"], tmp_path, timeout=300)
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if "| peft-metamath | " in line]
    assert len(rows) == 4, "three points, and one line of coverage by source"
    assert "not planned" not in done.out
