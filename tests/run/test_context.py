"""Context parallelism, for real on CPU: sequences split over processes train as whole ones do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import write
from tests.run.test_backends import assert_same_training
from tests.small import Project, called, copied

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
UNPACKED = ("--set", "data.packing=false")
CONTEXT = ("--accelerate-config", "context")
SLIDING = """
stage: pretrain
extends: base.yaml
model:
  config: {model_type: mistral, sliding_window: 8}
"""


@pytest.fixture(scope="module")
def whole(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """cpt on unpacked text by one process: the base of all comparisons."""
    project = copied(finished, tmp_path_factory.mktemp("whole"))
    project.run("cpt", *UNPACKED)
    return project


def test_two_processes_that_share_each_sequence_train_as_one(small: Project, whole: Project) -> None:
    """The whole global batch falls to one pair, in two parts; measured between the steps, with the chunked loss."""
    out = small.run("cpt", *CONTEXT, "--num-processes", "2", *UNPACKED, "--set", "training.eval_steps=5",
                    "--set", "training.fused_linear_cross_entropy=torch")  # fmt: skip
    assert "fsdp2, 2 processes, each sequence over 2" in out
    assert_same_training(small, whole)
    lines = [json.loads(line) for line in (small.path("cpt") / "metrics.jsonl").read_text().splitlines()]
    theirs = [json.loads(line) for line in (whole.path("cpt") / "metrics.jsonl").read_text().splitlines()]
    for mine, one in zip((line for line in lines if "loss" in line), (line for line in theirs if "loss" in line), strict=True):
        assert (mine["tokens"], mine["bytes"]) == (one["tokens"], one["bytes"])
        assert mine["train_bpb"] == pytest.approx(one["train_bpb"], abs=5e-5)


@pytest.mark.long
def test_pairs_of_processes_share_sequences_and_what_they_stop_at_goes_on_without_pairs(small: Project, whole: Project) -> None:
    """Four processes are two pairs over which the model is sharded; one goes on from their checkpoint."""
    code = small.interrupt(
        "cpt",
        lambda run: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 10,
        15, *CONTEXT, "--num-processes", "4", *UNPACKED,
    )  # fmt: skip
    assert code == 143
    assert small.status("cpt")["state"] == "interrupted"
    out = small.run("cpt", "--accelerate-config", "fsdp", "--num-processes", "1", *UNPACKED)
    assert "going on from" in out
    assert_same_training(small, whole)


def test_what_cannot_be_split_is_refused_before_anything_is_started(small: Project) -> None:
    out = small.run("cpt", *CONTEXT, "--num-processes", "2", "--set", "model.attn_implementation=eager", code=2)
    assert "packed documents would see each other" in out
    assert "for sdpa only" in out
    assert "use accelerate_configs/fsdp.yaml" in small.run("sft", *CONTEXT, "--num-processes", "2", code=2)
    assert "splits each sequence over 2 processes, and 3 do not divide" in small.run(
        "cpt", *CONTEXT, "--num-processes", "3", *UNPACKED, code=2
    )
    assert not small.path("cpt").exists()


def test_pytorch_still_splits_cuda_s_attention_only(tmp_path: Path) -> None:
    """distributed/cpu_backend.py adds the CPU's operators to this table; the day they are in it, that is not needed."""
    code = "from torch.distributed.tensor.experimental._context_parallel import _attention; print(*_attention.custom_ops)"
    done = called([sys.executable, "-c", code], tmp_path)
    named = done.out
    assert done.code == 0, done.err
    assert "_scaled_dot_product_efficient_attention" in named
    assert "for_cpu" not in named


def test_a_model_whose_layers_see_a_window_only_is_refused(small: Project) -> None:
    write(small.folder / "sliding.yaml", SLIDING)
    out = small.run("sliding", *CONTEXT, "--num-processes", "2", *UNPACKED, code=2)
    assert "has sliding_attention layers, which do not attend to all earlier tokens" in out
