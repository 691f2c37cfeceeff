"""Attention by the borders of documents trains what attention with masks trains: new rows, adapters, sharded; and a run keeps its kind."""

from __future__ import annotations

import importlib.util
import json
import signal

import pytest
import torch

from tests.run.test_backends import assert_same_training, lines
from tests.small import Project

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
VARLEN = ("--set", "model.attn_implementation=varlen")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def test_varlen_trains_new_rows_as_the_mask_does_and_a_run_that_goes_on_keeps_it(small: Project, finished: Project) -> None:
    code = small.interrupt("cpt", lambda run: any(run.rglob("checkpoints/full/*/COMPLETE.json")), signal.SIGKILL, *VARLEN)
    assert code == -signal.SIGKILL
    text = small.run("cpt")  # the recipe says auto, which is sdpa on a CPU
    assert "attention: varlen (as at the run's earlier start)" in text
    assert "going on from" in text
    assert small.result("cpt")["attn_implementation"] == "varlen"
    assert json.loads((small.path("cpt") / "environment.json").read_text())["attn_implementation"] == "varlen"
    assert_same_training(small, finished)
    for stage in ("cpt", "sft", "evaluate"):
        assert finished.result(stage)["attn_implementation"] == "sdpa"
        assert json.loads((finished.path(stage) / "environment.json").read_text())["attn_implementation"] == "sdpa"


@pytest.mark.long
@pytest.mark.parametrize("config", ["fsdp", pytest.param("zero3", marks=needs_deepspeed)])
def test_varlen_trains_alike_where_the_model_is_sharded(small: Project, finished: Project, config: str) -> None:
    small.run("cpt", *VARLEN, "--accelerate-config", config, "--num-processes", "2", "--set", "training.per_device_train_batch_size=2")
    assert small.result("cpt")["attn_implementation"] == "varlen"
    assert_same_training(small, finished)


@pytest.mark.long
def test_an_adapter_trains_alike_on_packed_conversations(finished: Project, small: Project) -> None:
    for attention, runs in (("varlen", "runs"), ("sdpa", "masked")):
        (small.folder / runs / "small").mkdir(parents=True, exist_ok=True)
        (small.folder / runs / "small" / "cpt").symlink_to(finished.path("cpt"))
        small.run("sft", "--set", "data.packing=true", "--set", f"model.attn_implementation={attention}", runs=runs)
    varlen, masked = small.result("sft"), small.result("sft", "masked")
    assert (varlen["attn_implementation"], masked["attn_implementation"]) == ("varlen", "sdpa")
    assert varlen["held_out_loss"]["after"] == pytest.approx(masked["held_out_loss"]["after"], abs=1e-4)
    masked_lines = [json.loads(line) for line in (small.path("sft", "masked") / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines(small, "sft")] == pytest.approx(
        [line["loss"] for line in masked_lines if "loss" in line], abs=1e-5
    )
