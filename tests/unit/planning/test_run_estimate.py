"""What is foreseen of a run on cards that are not here: verdicts, the change that makes it fit, and what a lack of memory is told with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe import hardware
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CannotRun
from azrecipe.planning import evaluation_memory, memory_budget, run_estimate, training_loops
from azrecipe.planning.model_config import ModelShape
from azrecipe.planning.run_estimate import LocalDevices
from azrecipe.planning.simulation import cost_cache
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.report import estimate_section
from azrecipe.report.html import render_sections
from azrecipe.runs.reader import RunRecord
from azrecipe.runs.run_dir import RunDir
from tests.conftest import jsonl, write
from tests.small import fill

ONE = Backend("single", 1, 0)
LARGE = ModelShape(
    {"model_type": "llama", "vocab_size": 340, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 3,
     "num_attention_heads": 8, "num_key_value_heads": 8},
    0, (),
)  # fmt: skip
LIGER = {"use_liger_kernel": True}
BOTH = {"use_liger_kernel": True, "activation_checkpointing": True}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("AZRECIPE_FORESEE_SECONDS", "300")  # a busy machine is no failure
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """base.yaml with a batch of 8 on the device, and all that is asked about it below known already."""
    folder = tmp_path_factory.mktemp("recipes")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = load_recipe("base.yaml", parse_overrides(["data.max_length=128"]))
    changed = [recipe, *(with_(recipe, sets) for sets in (LIGER, {"activation_checkpointing": True}, BOTH))]
    asked = [(each, shape(each), ONE) for each in changed]
    asked += [(changed[-1], LARGE, backend) for backend in (Backend("ddp", 8, 0, 8), Backend("fsdp2", 8, 0))]
    run_estimate.simulate_in_subprocess([(loop.step, loop.length) for each in asked for loop in training_loops.plan_loops(*each)])
    return recipe


def with_(recipe: Recipe, sets: dict[str, Any]) -> Recipe:
    return run_estimate._set_training(recipe, sets)


def load_changed(recipe: Recipe, **training: Any) -> Recipe:
    return replace(recipe, config=replace(recipe.config, training=replace(recipe.config.training, **training)))


def shape(recipe: Recipe) -> ModelShape:
    return ModelShape({**recipe.config.model.config, "vocab_size": 340}, 0, ())


def needed(recipe: Recipe, batch: int) -> int:
    """Bytes that a card must have for `batch` sequences to fit surely."""
    (loop,) = training_loops.plan_loops(recipe, shape(recipe), ONE)
    (cost,) = cost_cache.load_or_simulate_costs([(loop.step, loop.length)])
    return int(memory_budget.compute_memory_budget(cost, loop.step, batch, 1).upper_bound) + 1


def a100(size: int) -> LocalDevices:
    return LocalDevices("NVIDIA A100-SXM4-40GB", size, hardware.build_machine_of_device("NVIDIA A100-SXM4-40GB", 1, size), 1)


def test_where_it_fits_memory_and_rate_are_said_and_nothing_is_warned_of(base: Recipe) -> None:
    found = run_estimate.build_estimate(base, shape(base), ONE, a100(40 * 2**30))
    (loop,) = found["loops"]
    assert (loop["verdict"], loop["change"]) == ("fits", None)
    assert loop["memory"]["parts"]["weights"] == pytest.approx(4 * loop["parameters"]["total"], rel=0.05), "a GPU's allocator rounds up"
    assert loop["memory"]["peak"] == pytest.approx(sum(loop["memory"]["parts"].values()), abs=len(loop["memory"]["parts"]))
    rate = loop["tokens_per_second"]
    assert 0 < rate["low"] < rate["middle"] < rate["high"]
    (line,) = run_estimate.format_lines(found)
    assert line.startswith("  estimate, english: ")
    assert "of 40.0 GiB (a100-40g)" in line
    assert f"{rate['low']:,.0f}–{rate['high']:,.0f} tokens/s" in line


def test_the_smallest_change_that_fits_is_named(base: Recipe) -> None:
    def said(size: int) -> str:
        return "\n".join(run_estimate.format_lines(run_estimate.build_estimate(base, shape(base), ONE, a100(size))))

    fewer = said(needed(base, 5))
    assert "warning: english does not fit on this card. What fits: --set training.per_device_train_batch_size=4" in fewer, (
        "4 divides 8, 5 does not"
    )
    one = needed(base, 1) - 2
    assert needed(with_(base, LIGER), 1) <= one
    assert "What fits: --set training.use_liger_kernel=true" in said(one)
    nothing = said(2**29)
    assert "warning: english does not fit on this card. No single change that keeps the result makes it fit" in nothing


def test_whole_copies_that_do_not_fit_are_sharded(base: Recipe) -> None:
    backend, recipe = Backend("ddp", 8, 0, 8), with_(base, BOTH)
    (loop,) = training_loops.plan_loops(recipe, LARGE, backend)
    (cost,) = cost_cache.load_or_simulate_costs([(loop.step, loop.length)])
    least = memory_budget.compute_memory_budget(cost, loop.step, 1, 8, 8).lower_bound
    (found,) = run_estimate.build_estimate(recipe, LARGE, backend, a100(int(least) - 1))["loops"]
    assert (found["verdict"], found["change"]) == ("does not fit", "--accelerate-config fsdp")


def test_a_card_that_is_not_known_is_held_against_its_memory_alone(base: Recipe) -> None:
    found = run_estimate.build_estimate(base, shape(base), ONE, LocalDevices("Some Card", 2**29, None, 1))
    assert (found["loops"][0]["verdict"], found["loops"][0]["tokens_per_second"]) == ("does not fit", None)
    assert "of 512.0 MiB (Some Card), no rate: this card is not known" in run_estimate.format_lines(found)[0]


def test_a_gpu_without_memory_is_told_with_what_was_foreseen_and_what_would_fit(base: Recipe, tmp_path: Path) -> None:
    place = RunDir(tmp_path, True, tmp_path)

    def told() -> str:
        with pytest.raises(CannotRun) as caught, run_estimate.explain_out_of_memory(place):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return str(caught.value)

    assert told().startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n  Lower training")
    assert "Estimate for" not in told()
    write(tmp_path / run_estimate.PLAN_FILE, json.dumps(run_estimate.build_estimate(base, shape(base), ONE, a100(needed(base, 5)))))
    write(tmp_path / "history.jsonl", jsonl({"event": "started"}))
    assert "Estimate for" not in told(), "it was measured, and no loop had begun"
    write(tmp_path / "history.jsonl", jsonl({"event": "started"}, {"event": "training", "phase": "english", "step": 0}))
    assert "(does not fit). What fits: --set training.per_device_train_batch_size=4" in told()
    write(tmp_path / run_estimate.PLAN_FILE, json.dumps(run_estimate.build_estimate(base, shape(base), ONE, a100(2**35))))
    assert (
        "(fits): the estimate was too low, or another process has memory of this card (nvidia-smi tells), or --set training.per_" in told()
    )


def test_the_page_of_a_run_on_gpus_shows_foreseen_against_measured_for_each_phase(tmp_path: Path) -> None:
    def loop(name: str, peak: int, rate: float) -> dict[str, Any]:
        return {"name": name, "memory": {"peak": peak}, "tokens_per_second": {"low": rate / 2, "middle": rate, "high": 2 * rate}}

    plan = {
        "device": "NVIDIA L4",
        "card": {"name": "l4", "bytes": 23},
        "processes": 4,
        "loops": [loop("a", 3 * 2**30, 900.0), loop("b", 2**30, 50.0)],
    }
    write(tmp_path / "plan.json", json.dumps(plan))
    write(tmp_path / "recipe.yaml", "stage: pretrain\ndata: {packing: true}\n")
    lines = [(1, 10.0, 1), (2, 1000.0, 4), (3, 800.0, 3), (4, 1200.0, 2)]
    logged = [
        {"phase": "a", "step": step, "loss": 1.0, "tokens_per_second": rate, "peak_memory_bytes": peak * 2**30}
        for step, rate, peak in lines
    ]
    write(tmp_path / "metrics.jsonl", jsonl(*logged, {"phase": "a", "step": 4, "eval_x_bpb": 1.0}))
    run = RunRecord(tmp_path, "r")
    assert estimate_section.build_rows(run) == [
        ["a", "3.00 GiB", "4.00 GiB", "-25.0%", "900", "1,000", "-10.0%"],
        ["b", "1.00 GiB", "–", "–", "50", "–", "–"],
    ]
    shown = render_sections([estimate_section.build_section(run)])
    assert "Estimated and measured</h2>" in shown
    assert "on 4 × NVIDIA L4" in shown
    assert estimate_section.list_notes(run) == []
    assert estimate_section.build_section(RunRecord(tmp_path / "none", "n")).body == ""


def test_a_loop_whose_measurements_do_not_fit_does_not_fit(base: Recipe) -> None:
    recipe = load_changed(base, per_device_eval_batch_size=4096)
    card = a100(needed(base, 8))
    (loop,) = run_estimate.build_estimate(recipe, shape(recipe), ONE, card)["loops"]
    assert loop["memory"]["peak"] < loop["memory"]["measuring"]
    assert loop["verdict"] == "does not fit"
    option, _, batch = loop["change"].rpartition("=")
    assert option == "--set training.per_device_eval_batch_size"
    (planned,) = training_loops.plan_loops(recipe, shape(recipe), ONE)
    (cost,) = cost_cache.load_or_simulate_costs([(planned.step, planned.length)])
    fits = {
        size: evaluation_memory.compute_evaluation_budget(cost, replace(planned, eval_batch=size), 1).upper_bound <= card.memory_bytes
        for size in (int(batch), 2 * int(batch))
    }
    assert fits == {int(batch): True, 2 * int(batch): False}
    assert 0 < int(batch) < 4096


def test_old_cards_are_planned_with_the_attention_that_they_run(base: Recipe) -> None:
    packed = replace(base.config, training=replace(base.config.training, precision="bf16_mixed"))
    model = ModelShape({"model_type": "llama", "vocab_size": 340, "hidden_size": 64, "num_attention_heads": 4}, 0, ())
    cards = hardware.load_catalog().cards
    attention = {name: training_loops.resolve_attention(packed, model, ONE, True, cards[name]) for name in cards}
    assert {attention[name] for name in ("t4", "v100-16g", "v100-32g")} == {"sdpa"}
    assert {attention[name] for name in cards if cards[name].bf16} == {"varlen"}, "AMD's too"
    capabilities = {name: training_loops.build_attention_device(cards[name]).capability for name in cards}
    assert (capabilities["t4"], capabilities["h100-80g"], capabilities["mi300x"]) == ((7, 5), (9, 0), (9, 4))


def test_steps_are_simulated_in_the_background_and_only_once(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZRECIPE_FORESEE", "1")
    recipe = load_changed(base, max_grad_norm=0.0)  # no other test's step
    simulation = run_estimate.begin_simulation(recipe, shape(recipe), ONE)
    assert simulation is not None
    first = run_estimate.build_estimate(recipe, shape(recipe), ONE, None, simulation)
    monkeypatch.setenv("AZRECIPE_FORESEE_SECONDS", "0.001")  # from here on a simulation would take too long
    assert run_estimate.build_estimate(recipe, shape(recipe), ONE, None) == first
    other = load_changed(base, max_grad_norm=0.0, optim="adafactor")
    late = run_estimate.begin_simulation(other, shape(other), ONE)
    with pytest.raises(run_estimate.EstimateUnavailable, match=r"more than 0.001 s"):
        run_estimate.build_estimate(other, shape(other), ONE, None, late)
    assert run_estimate.begin_simulation(recipe, shape(recipe), Backend("ddp", 2, 1, 2)) is None, "only the main process does it"
    monkeypatch.setenv("AZRECIPE_FORESEE", "0")
    assert run_estimate.begin_simulation(recipe, shape(recipe), ONE) is None
