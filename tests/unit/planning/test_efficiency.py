"""What share of a card's roofline steps reach: from which runs, and in what range."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from azrecipe.hardware import load_catalog, read_shipped_file
from azrecipe.planning.efficiency import EfficiencyRun, StepKind, classify_step, estimate_efficiency, load_efficiency_runs
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.recipe.types import Lora

CARDS = load_catalog().cards
A100, H100, L4 = CARDS["a100-80g"], CARDS["h100-80g"], CARDS["l4"]
FULL, LORA, COMPILED = StepKind("full", "eager"), StepKind("lora", "eager"), StepKind("full", "compiled")
METHODS, EXECUTIONS = ("full", "lora", "qlora"), ("eager", "fused", "compiled")


def run(source: str, efficiency: float, peak: float = A100.bf16_tflops, kind: StepKind = FULL) -> EfficiencyRun:
    return EfficiencyRun(source, "a100-80g", peak, kind, efficiency)


def test_a_source_counts_once_however_many_runs_it_has() -> None:
    runs = [run("one", 0.4), *(run("two", 0.6) for _ in range(9)), run("three", 0.5)]
    assert estimate_efficiency(A100, FULL, published=runs).share.middle == pytest.approx(0.5)


def test_a_range_is_as_wide_as_sources_differ() -> None:
    near, far = ([run("one", 0.5), run("two", 0.5 * factor)] for factor in (1.05, 1.4))
    for runs, factor in ((near, 1.05), (far, 1.4)):
        share = estimate_efficiency(A100, FULL, published=runs).share
        assert (share.middle / share.low, share.high / share.middle) == pytest.approx((factor, factor))
    alone = estimate_efficiency(A100, FULL, published=near[:1]).share
    assert alone.high / alone.middle == pytest.approx(2.0), "one source does not show how far sources differ"


@pytest.mark.parametrize(
    ("runs", "middle", "said"),
    [
        ([run("a", 0.1), run("b", 0.2, kind=LORA)], 0.1, "such steps on this chip"),
        ([run("a", 0.1, kind=COMPILED), run("b", 0.2, kind=LORA)], 0.1, "steps of this method on this chip"),
        ([run("a", 0.1, kind=LORA), run("b", 0.2, peak=1.0)], 0.1, "other steps on this chip"),
        ([run("a", 0.1, peak=1.0), run("b", 0.2, peak=1.0, kind=LORA)], 0.1, "such steps on other chips"),
        ([run("a", 0.1, peak=1.0, kind=LORA)], 0.1, "steps on other chips"),
    ],
)
def test_the_nearest_runs_count(runs: list[EfficiencyRun], middle: float, said: str) -> None:
    estimated = estimate_efficiency(A100, FULL, published=runs)
    assert estimated.share.middle == pytest.approx(middle)
    assert f", {said} (" in estimated.basis


def test_a_card_of_the_user_s_shares_the_runs_of_its_chip() -> None:
    mine = replace(H100, name="mine", memory_gb=96, total_memory_gib=94.5)
    shipped, own = (estimate_efficiency(card, FULL) for card in (H100, mine))
    assert own == shipped
    assert own.has_card


def test_a_chip_without_a_run_is_said_to_have_none_and_its_range_is_wider() -> None:
    known, unknown = estimate_efficiency(A100, FULL), estimate_efficiency(L4, FULL)
    assert (known.has_card, unknown.has_card) == (True, False)
    assert unknown.basis.endswith("none on l4 is known")
    assert unknown.share.high / unknown.share.middle > known.share.high / known.share.middle


def test_h100_rests_on_independent_sources_and_on_no_batch_that_was_guessed() -> None:
    """Of the runs that gave 0.871, two were of a training whose batch nobody published."""
    assert 0.45 < estimate_efficiency(H100, FULL).share.middle < 0.62
    assert len({run.source for run in load_efficiency_runs() if run.card == "h100-80g"}) > 1


def test_every_kind_of_step_has_a_share_below_the_roofline() -> None:
    for card, method, execution in itertools.product(CARDS.values(), METHODS, EXECUTIONS):
        share = estimate_efficiency(card, StepKind(method, execution)).share
        assert 0 < share.low < share.middle < share.high
        assert share.middle <= 1


def test_every_run_has_its_source_and_day_and_stays_below_the_roofline() -> None:
    content = read_shipped_file("efficiencies.yaml").to_plain()
    assert {run["source"] for run in content["runs"]} == set(content["sources"])
    assert all(source["url"].startswith("https://") and source["date"] for source in content["sources"].values())
    assert all(0 < run["efficiency"] <= 1 for run in content["runs"])
    assert {run["method"] for run in content["runs"]} <= set(METHODS)
    assert {run["execution"] for run in content["runs"]} <= set(EXECUTIONS)


def test_a_step_s_kind_is_what_trains_and_how_its_layers_run() -> None:
    step = StepSpec(config={}, precision="bf16_mixed")
    lora = replace(step, lora=Lora(8, 16, 0.0, "all-linear", False, False, [], False))
    assert classify_step(step) == ("full", "eager")
    assert classify_step(replace(lora, kernels=("rms_norm",))) == ("lora", "fused")
    assert classify_step(replace(lora, quantized=True, kernels=("rms_norm",), torch_compile=True)) == ("qlora", "compiled")
