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
from azrecipe.hardware import read_shipped_file
from azrecipe.planning.efficiency import Span, classify_step
from azrecipe.planning.simulation.step_cost import (
    BatchLinear,
    HeadShape,
    MemoryLine,
    OperatorGroup,
    OperatorWork,
    ParameterCounts,
    StepCost,
)
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


def make_cost(seconds: float) -> StepCost:
    """A step that an A100's peak takes so long for."""
    work = OperatorWork(BatchLinear(0.0, 312e12 * seconds), BatchLinear(0.0, 0.0), BatchLinear(0.0, 0.0), False)
    return StepCost(
        4096,
        1,
        ParameterCounts(0, 0, 0, 0, 0),
        HeadShape("logits", 0, 0),
        (MemoryLine((1.0,) * 11, (0.0,) * 11, 0.0),),
        (OperatorGroup(False, 1, work),),
        0.0,
        0.0,
    )


def make_prediction(reader: ModuleType, coverage: ModuleType, source: str, rate: float, **changes: Any) -> Any:
    """A step of one A100 whose roofline is 4,096 tokens a second, and which is planned at 3,277 (2,900 to 3,654)."""
    point = replace(
        reader.read_points()[0], name=f"{source} {rate:g}", source=source, tokens_per_second=rate, batch=1, length=4096, accumulation=1
    )
    values = {
        "rate": Span(2900.0, 3276.8, 3653.6),
        "basis": "",
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
    rates = {"a": 0.5, "b": 0.6, "c": 0.9}
    predictions = [make_prediction(reader, coverage, source, 4096 * share) for source, share in rates.items()]
    found = coverage.leave_source_out(predictions, {p.point.name: make_cost(1.0) for p in predictions})
    assert [p.rate.middle / 4096 for p in found] == pytest.approx([0.75, 0.7, 0.55])
    assert all(p.basis.startswith("2 published runs of 2 sources, such steps on this chip") for p in found)
    assert (found[0].rate.high / found[0].rate.middle) == pytest.approx(0.9 / 0.6), "as far as the two others are apart"


def test_what_does_not_show_a_card_s_speed_tells_no_efficiency(reader: ModuleType, coverage: ModuleType) -> None:
    plain = make_prediction(reader, coverage, "a", 2048.0)
    assert [(run.source, run.efficiency, run.kind) for run in coverage.list_efficiency_runs([plain])] == [("a", 0.5, ("full", "eager"))]
    above = make_prediction(reader, coverage, "b", 5000.0)
    for changed in (
        replace(plain, bottleneck="links"),
        replace(plain, point=replace(plain.point, length=1024)),
        replace(plain, point=replace(plain.point, is_lower_bound=True)),
        replace(plain, point=replace(plain.point, beyond_plan="activations are offloaded")),
        above,
    ):
        assert coverage.list_efficiency_runs([changed]) == []


def test_every_efficiency_that_is_shipped_is_a_point_s(reader: ModuleType) -> None:
    points = {point.name: point for point in reader.read_points()}
    for run in read_shipped_file("efficiencies.yaml").to_plain()["runs"]:
        point = points[run["what"]]
        assert (point.source, point.card, (run["method"], run["execution"])) == (run["source"], run["card"], classify_step(point.step))


def test_coverage_counts_the_rates_and_peaks_that_the_ranges_hold(reader: ModuleType, coverage: ModuleType) -> None:
    inside, outside = (make_prediction(reader, coverage, "a", rate) for rate in (3604.48, 4096.0))
    assert (inside.rate_inside, outside.rate_inside) == (True, False)
    assert outside.rate_error == pytest.approx(-0.2)
    assert inside.efficiency == pytest.approx(0.88)
    assert inside.memory_inside and inside.memory_error == pytest.approx(0.1), "reserved memory lies in the range around the tensors"
    allocated = replace(inside, point=replace(inside.point, memory_of="allocated"))
    assert allocated.memory_inside and allocated.memory_error == pytest.approx(-0.04), "allocated memory is that of the tensors, within 5 %"
    rates = [(p.rate, p.point.tokens_per_second) for p in (inside, outside)]
    assert coverage.summarize_rates(rates) == ("2", "1 (50%)", "-14.5%", "± 11%")
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
