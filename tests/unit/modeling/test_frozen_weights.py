"""Frozen matrices in bfloat16: the numbers of a training are those with float32 ones, bit for bit, and these come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from azrecipe.modeling.frozen_weights import find_matrices, restore_matrices, round_matrices
from azrecipe.modeling.parameter_groups import set_trainable_parameters
from tests.unit.training.small_trainer import build_model, copy_weights

BATCHES = torch.randint(0, 32, (4, 2, 12), generator=torch.Generator().manual_seed(3))


def train(model: Any, rounded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train four steps under autocast; returns the losses and the weights that trained."""
    if rounded:
        assert not round_matrices(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for batch in BATCHES:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trained.items()}


def build_phase(parts: list[str]) -> Any:
    model = build_model(num_hidden_layers=2)
    set_trainable_parameters(model, parts, [])
    return model


def build_adapter(**settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(build_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", **settings))


@pytest.mark.parametrize(
    "build",
    [lambda: build_phase(["embeddings", "head"]), lambda: build_phase(["layers[1:]"]), build_adapter],
    ids=["frozen backbone", "some layers", "LoRA"],
)
def test_a_training_is_the_same_bit_for_bit(build: Any) -> None:
    losses, weights = train(build(), rounded=False)
    rounded_losses, rounded_weights = train(build(), rounded=True)
    assert rounded_losses == losses
    assert weights.keys() == rounded_weights.keys()
    assert all(torch.equal(weights[name], tensor) and tensor.dtype == torch.float32 for name, tensor in rounded_weights.items())


def test_only_what_is_frozen_and_multiplied_is_rounded_and_it_comes_back() -> None:
    model = build_phase(["embeddings"])
    before = copy_weights(model)
    exact = round_matrices(model, keep_exact=True)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == exact.keys()
    assert all(".self_attn." in name or ".mlp." in name for name in exact) and len(exact) == 7 * len(model.model.layers)
    assert not find_matrices(model)  # a second call changes nothing
    restore_matrices(model, exact)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_measurement_is_the_same_bit_for_bit() -> None:
    """Also of what trains: no gradient is taken."""
    model = build_model(num_hidden_layers=2)
    before = copy_weights(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(BATCHES[0]).logits
        exact = round_matrices(model, keep_exact=True, frozen_only=False)
        assert len(exact) == 14 and torch.equal(model(BATCHES[0]).logits, logits)
    restore_matrices(model, exact)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_dora_and_four_bits_are_left_alone() -> None:
    assert not find_matrices(build_adapter(use_dora=True))
    model = build_phase(["embeddings"])
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data = torch.zeros(8, 1, dtype=torch.uint8)  # as bitsandbytes stores it
    assert not any("up_proj" in name for name in find_matrices(model))
