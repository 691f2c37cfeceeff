"""What `azrecipe plan --calibrate RUN` learns from a run on a GPU, where it keeps it, and which runs it refuses.

There is no GPU here: the run directories are written by hand as a run on a GPU leaves them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from azrecipe import hardware
from azrecipe.distributed.backend import Backend
from azrecipe.planning import calibration_file
from azrecipe.planning.efficiency import StepKind, estimate_efficiency
from azrecipe.planning.model_config import ModelShape
from azrecipe.planning.simulation import cost_cache
from azrecipe.planning.simulation.step_cost import CardPeaks
from azrecipe.planning.training_loops import plan_loops
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.runs import run_dir
from tests.conftest import Done, jsonl, write
from tests.small import fill

A100 = "NVIDIA A100-SXM4-40GB"
TOKENS = 8 * 32  # of a step of tests/small.py's base.yaml, all processes together
Cli = Callable[..., Done]


@pytest.fixture(scope="module", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Configuration and cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(autouse=True)
def nothing_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration_file.get_calibration_path().unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)


def config() -> dict[str, Any]:
    made: dict[str, Any] = {**load_recipe("base.yaml").config.model.config, "vocab_size": 340}
    return made


def seconds(*sets: str) -> float:
    """What the roofline of an A100 gives for a step of base.yaml."""
    (loop,) = plan_loops(load_recipe("base.yaml", parse_overrides(sets)), ModelShape(config(), 0, ()), Backend("single", 1, 0))
    (cost,) = cost_cache.load_or_simulate_costs([(loop.step, loop.length)])
    card = hardware.load_catalog().cards["a100-40g"]
    peaks = CardPeaks(card.bf16_tflops * 1e12, card.fp32_tflops * 1e12, card.memory_gb_per_s * 1e9)
    batch, optimizer = cost.compute_seconds(loop.batch, peaks, accumulates=loop.step.accumulates)
    return batch * loop.accumulation + optimizer


def ran(step_seconds: float, sets: tuple[str, ...] = (), lines: int = 12, **environment: Any) -> Path:
    """The directory of a run on one A100 whose steps took so long, but for the first and those in which a checkpoint was written."""
    recipe = load_recipe("base.yaml", parse_overrides(["training.save_steps=8", *sets]))
    run = run_dir.locate_run(recipe, Path("runs"))
    run.path.mkdir(parents=True, exist_ok=True)
    run_dir.write_recipe_files(recipe, run)
    found = {
        "gpus": [A100], "gpu_memory_bytes": [42_474_471_424], "world_size": 1, "nodes": 1, "versions": {"torch": "2.13.0"},
        "backend": {"kind": "single", "replicate": 1, "context": 1}, **environment,
    }  # fmt: skip
    write(run.path / "environment.json", json.dumps(found))
    write(run.path / "status.json", json.dumps({"state": "complete", "run_id": "abc"}))
    write(run.path / "final" / "config.json", json.dumps({**config(), "architectures": ["LlamaForCausalLM"]}))
    slow = {1: 50.0, 9: 20.0, 5: 7.0}  # the first, the one behind the checkpoint, and one that only was slow
    logged: list[dict[str, Any]] = [
        {"phase": "english", "step": step, "loss": 2.0, "tokens": step * TOKENS, "tokens_per_second": TOKENS / step_seconds / slow.get(step, 1.0)}
        for step in range(1, lines + 1)
    ]  # fmt: skip
    write(run.path / "metrics.jsonl", jsonl(*logged))
    return run.path


def test_a_run_tells_the_share_of_the_roofline_that_it_reached_and_plans_count_with_it(tmp_path: Path, cli: Cli) -> None:
    fill(tmp_path)
    roof = seconds()
    before = json.loads(cli("plan", "base.yaml", "--hardware", "a100-40g", "--no-levers", "--json").out)["loops"][0]
    run = ran(roof / 0.4)
    done = cli("plan", "--calibrate", run)
    assert done.code == 0, done.err
    assert "english: 0.400 of the roofline" in done.out
    assert f"{TOKENS * 0.4 / roof:,.0f} tokens/s a card, median of 10 logged lines" in done.out
    assert str(calibration_file.get_calibration_path()) in done.out
    after = json.loads(cli("plan", "base.yaml", "--hardware", "a100-40g", "--no-levers", "--json").out)["loops"][0]
    assert after["rests_on"] == "1 training loop of your own on a100-40g" != before["rests_on"]
    assert after["tokens_per_second"]["middle"] == pytest.approx(TOKENS * 0.4 / roof)
    elsewhere = json.loads(cli("plan", "base.yaml", "--hardware", "h100-80g", "--no-levers", "--json").out)["loops"][0]
    assert "your own" not in elsewhere["rests_on"]


def test_a_run_calibrated_again_takes_its_own_place_and_others_stay(tmp_path: Path, cli: Cli) -> None:
    fill(tmp_path)
    roof = seconds()
    calibration_file.add_calibrated_run({"run_id": "other", "card": "a100-40g", "loops": [{"name": "x", "efficiency": 0.7}]})
    for share in (0.4, 0.5):
        assert cli("plan", "--calibrate", ran(roof / share)).code == 0
    assert [(run["run_id"], run["loops"][0]["efficiency"]) for run in calibration_file.read_calibrated_runs()] == [
        ("other", 0.7),
        ("abc", 0.5),
    ]
    span, rests_on, _ = estimate_efficiency(
        hardware.load_catalog().cards["a100-40g"], StepKind("full", "eager"), calibration_file.read_efficiencies()
    )
    assert (span.low, span.middle, span.high) == pytest.approx((0.5, 0.6, 0.7))
    assert rests_on == "2 training loops of your own on a100-40g"


def test_accumulated_batches_count_and_lines_of_an_earlier_start_do_not(tmp_path: Path, cli: Cli) -> None:
    fill(tmp_path)
    sets = ("training.per_device_train_batch_size=2",)
    run = ran(seconds(*sets) / 0.25, sets, lines=20)
    begun = [{"event": "started"}, {"event": "training", "phase": "english", "step": 0}, {"event": "started"}]
    write(run / "history.jsonl", jsonl(*begun, {"event": "training", "phase": "english", "step": 8}))
    done = cli("plan", "--calibrate", run)
    assert "english: 0.250 of the roofline" in done.out, done.err
    assert "median of 10 logged lines" in done.out, "lines 10 to 20, without 17, which a checkpoint fell into"


def test_a_run_that_waits_for_its_links_says_nothing_of_the_card(tmp_path: Path, cli: Cli) -> None:
    fill(tmp_path)
    ddp = {"kind": "ddp", "replicate": 8, "context": 1}
    done = cli(
        "plan",
        "--calibrate",
        ran(1.0, gpus=["NVIDIA GeForce RTX 4090"] * 8, gpu_memory_bytes=[25_386_352_640] * 8, world_size=8, backend=ddp),
    )
    assert done.code == 2
    assert "it waits for the links between the cards" in done.err
    assert not calibration_file.get_calibration_path().exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": []}, "it ran on a CPU"),
        ({"gpus": ["NVIDIA Quadro K620"]}, "NVIDIA Quadro K620 is no card that is known here. Known: a100-40g"),
        ({"gpus": [A100, "NVIDIA L4"]}, "cards of several kinds"),
        ({"nodes": 2}, "2 machines"),
        ({"backend": None}, "an earlier azrecipe"),
        ({"lines": 5}, "it has 4: 6 steps at least, as logging_steps is 1"),
        ({"sets": ("training.logging_steps=2",), "lines": 3}, "12 steps at least, as logging_steps is 2 (save_steps is 8)"),
        ({"sets": ("data.packing=false",)}, "sequences differ in length"),
        ({"step_seconds": 1e-9}, "of what the card's peaks allow"),
    ],
)
def test_runs_that_tell_nothing_are_refused_with_the_reason(tmp_path: Path, cli: Cli, changes: dict[str, Any], said: str) -> None:
    fill(tmp_path)
    done = cli("plan", "--calibrate", ran(**{"step_seconds": 1.0, **changes}))
    assert done.code == 2
    assert said in done.err
    assert not calibration_file.get_calibration_path().exists()


def test_what_is_no_training_run_or_a_damaged_file_is_named(tmp_path: Path, cli: Cli) -> None:
    fill(tmp_path)
    assert "no run: there is no" in cli("plan", "--calibrate", "nowhere").err
    recipe = load_recipe("tokenizer.yaml")
    run = run_dir.locate_run(recipe, Path("runs"))
    run.path.mkdir(parents=True)
    run_dir.write_recipe_files(recipe, run)
    assert "this one trains no model" in cli("plan", "--calibrate", run.path).err
    write(calibration_file.get_calibration_path(), '{"runs": [{"card": "a100-40g"}]}')
    done = cli("plan", "base.yaml", "--hardware", "a100-40g", "--no-levers")
    assert (done.code, done.out) == (2, "")
    assert f"{calibration_file.get_calibration_path()} is not what azrecipe plan --calibrate writes" in done.err
