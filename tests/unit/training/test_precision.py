"""Precision: what each setting makes of weights, optimizer state and arithmetic, and weights in another format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.distributed.backend import Backend
from azrecipe.modeling.dtypes import PARAM_DTYPES
from azrecipe.training.precision import apply_precision, configure_autocast, find_precision_problems
from tests.unit.training.small_trainer import SINGLE, SmallTrainer, build_model, build_rows, build_trainer

FSDP, ZERO = Backend("fsdp2", 2, 0), Backend("zero2", 2, 0)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator, on any machine; variables that a test sets are put back."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def train(folder: Path, precision: str) -> tuple[SmallTrainer, list[torch.dtype]]:
    """Train three steps; returns the trainer and the number formats that the matrices of the model multiplied in."""
    model = build_model().to(PARAM_DTYPES[precision])
    trainer = build_trainer(folder, build_rows(6), model=model, **configure_autocast(precision, SINGLE))
    dtypes: list[torch.dtype] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
    trainer.train()
    return trainer, dtypes


@pytest.mark.parametrize(
    ("precision", "weights", "arithmetic"),
    [
        ("float32", torch.float32, torch.float32),
        ("bf16_mixed", torch.float32, torch.bfloat16),
        ("bf16_pure", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_precision_is_a_format_of_weights_moments_and_arithmetic(
    tmp_path: Path, precision: str, weights: torch.dtype, arithmetic: torch.dtype
) -> None:
    trainer, dtypes = train(tmp_path, precision)
    assert set(dtypes) == {arithmetic}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {weights}
    moments = [value for state in trainer.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert moments and {moment.dtype for moment in moments} == {weights}
    assert find_precision_problems(trainer, precision, SINGLE) == []
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_precisions_train_different_numbers(tmp_path: Path) -> None:
    """Each lies near float32, and neither is it: a setting that changed nothing would give equal weights."""
    models = {precision: train(tmp_path / precision, precision)[0].model for precision in PARAM_DTYPES}
    exact = models["float32"].lm_head.weight.detach()
    for precision in ("bf16_mixed", "bf16_pure"):
        difference = float((models[precision].lm_head.weight.detach().float() - exact).abs().max())
        assert 1e-6 < difference < 0.1, precision
    assert not torch.equal(models["bf16_mixed"].lm_head.weight, models["bf16_pure"].lm_head.weight.float())


@pytest.mark.parametrize(
    ("precision", "backend", "arguments", "variable"),
    [
        ("float32", FSDP, {"bf16": False}, "no"),
        ("bf16_pure", FSDP, {"bf16": False}, "no"),
        ("bf16_mixed", SINGLE, {"bf16": True, "use_cpu": True}, "no"),
        ("bf16_mixed", Backend("ddp", 2, 0), {"bf16": True, "use_cpu": True}, "no"),
        ("bf16_mixed", FSDP, {"bf16": False}, "bf16"),
        ("bf16_mixed", ZERO, {"bf16": False}, "no"),
    ],
)
def test_autocast_is_asked_for_where_the_backend_listens(
    precision: str, backend: Backend, arguments: dict[str, bool], variable: str
) -> None:
    assert configure_autocast(precision, backend) == arguments
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == variable


def test_sharded_backends_sum_gradients_in_float32(tmp_path: Path) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    trainer = build_trainer(tmp_path, build_rows(2))
    state: Any = trainer.accelerator.state
    for precision in ("float32", "bf16_pure", "bf16_mixed"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        before = state.fsdp_plugin.mixed_precision_policy
        apply_precision(trainer, precision, FSDP)
        policy = state.fsdp_plugin.mixed_precision_policy
        if precision == "bf16_mixed":
            assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        else:
            assert policy is before
    del state.fsdp_plugin


def test_weights_in_another_format_are_named(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, build_rows(2))
    assert find_precision_problems(trainer, "bf16_mixed", SINGLE) == []
    assert find_precision_problems(trainer, "bf16_pure", SINGLE) == [
        "trained weights are float32 and precision: bf16_pure keeps them in bfloat16"
    ]
    head = trainer.model.model.layers[0].mlp.up_proj
    head.to(torch.bfloat16)
    assert find_precision_problems(trainer, "float32", SINGLE) == [
        "trained weights are bfloat16 and float32 and precision: float32 keeps them in float32"
    ]
    head.requires_grad_(False)  # a frozen backbone may have another format
    assert find_precision_problems(trainer, "float32", SINGLE) == []


def test_an_adapter_keeps_its_own_format(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model().to(torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = build_trainer(tmp_path, build_rows(2), model=model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert find_precision_problems(trainer, "bf16_pure", SINGLE) == []
