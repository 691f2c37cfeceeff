"""The number of tokens that a step's loss is divided by reaches a sharded model whole, not rounded to bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.small import fill

# 44 sequences of 32 tokens: numbers from 1,024 on are 8 apart in bfloat16
ASKED = (
    "training.precision=bf16_mixed",
    "training.global_batch_size=44",
    "training.per_device_train_batch_size=4",
    "training.save_steps=100",
)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
def test_a_sharded_model_s_loss_in_bf16_mixed_is_one_process(tmp_path: Path) -> None:
    """FSDP gives its model's floating-point arguments in bfloat16, and transformers counts a step's tokens in float32."""
    project = fill(tmp_path)
    sets = [part for pair in ASKED for part in ("--set", pair)]
    steps = ("--set", "phases=[{name: english, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 3}]")
    project.run("base", *sets, *steps)
    project.run("base", *sets, *steps, "--accelerate-config", "fsdp", "--num-processes", "1", runs="sharded")
    single, sharded = project.losses("base"), project.losses("base", runs="sharded")
    assert len(single) == 3
    assert sharded == pytest.approx(single, rel=4e-4)
