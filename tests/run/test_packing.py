"""Whole small runs of the ways to pack and to mix."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Done, write
from tests.small import assert_same_weights, fill

BFD = ("--set", "data.packing_strategy=bfd", "--set", "phases[0].max_steps=8")
ONCE = ("--set", "data.stopping_strategy=all_exhausted_without_replacement")


def test_best_fit_goes_on_after_a_kill_as_if_nothing_had_been_whatever_reads_the_data(tmp_path: Path) -> None:
    project = fill(tmp_path)
    project.run("base", *BFD)
    workers = (*BFD, "--set", "training.trainer_arguments.dataloader_num_workers=2")
    code = project.interrupt("base", lambda run: any(run.rglob("COMPLETE.json")), signal.SIGKILL, *workers, runs="killed")
    assert code == -signal.SIGKILL
    assert "going on from" in project.run("base", *workers, runs="killed")
    assert_same_weights(project.path("base") / "final", project.path("base", "killed") / "final")
    phase = project.result("base")["phases"]["english"]
    assert 0.9 < phase["fill"] < 1
    assert phase["tokens"] == round(phase["fill"] * 8 * 8 * 32)
    lines = [json.loads(line) for line in (project.path("base") / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if line.get("step") == 8 and "tokens" in line)
    assert (last["tokens"], last["bytes"]) == (phase["tokens"], phase["bytes"])
    end = project.result("base")["data_end"]
    assert (end["token"], end["sequence"]) == (phase["tokens"], 64)


def test_text_that_is_used_once_ends_the_phase_and_is_not_begun_again(tmp_path: Path) -> None:
    project = fill(tmp_path)
    said = project.run("base", *ONCE, code=2)
    assert "base.yaml:11:" in said
    assert "phase english needs 20 steps" in said
    assert not project.path("base").exists()
    project.run("base", *ONCE, "--set", "data.packing=false", "--set", "phases[0].max_steps=null", "--set", "phases[0].num_train_epochs=1")
    result = project.result("base")
    (source,), phase = result["data"], result["phases"]["english"]
    left = source["tokens"] + 2 * source["documents"] - phase["tokens"]
    assert 0 <= left < 8 * 32  # less than a step of 8 sequences
    assert source["epochs"] <= 1


def test_weights_and_a_temperature_are_refused_together(project: Path, cli: Callable[..., Done]) -> None:
    write(
        "cpt.yaml",
        """\
stage: pretrain
project: p
model: {name_or_path: ./llama}
data:
  datasets:
    - {path: text.txt, weight: 3}
    - {path: text.jsonl}
  validation: {target: {path: heldout.txt}}
  sampling_temperature: 2
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
training: {global_batch_size: 1}
""",
    )
    done = cli("validate", "cpt.yaml")
    assert done.code == 2
    assert "cpt.yaml:6:" in done.text
    assert "sampling_temperature" in done.text
