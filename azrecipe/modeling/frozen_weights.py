"""Matrices that do not train in bfloat16, where autocast multiplies in bfloat16 anyway.

Autocast rounds a matrix before each product, and autograd keeps the rounded copy until the backward pass: 6 bytes a number. A frozen matrix
that is stored rounded takes 2 and gives the same product; so does any matrix while a model is only measured. Embeddings, the head and norms stay as they are: they compute in float32, or their
values reach the stream between layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def find_matrices(model: Any, frozen_only: bool = True) -> dict[str, torch.Tensor]:
    """Find the float32 weights of linear layers, without the head's.

    There are none beside a DoRA adapter, whose magnitudes are computed from these weights.
    """
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        return {}
    head = model.get_output_embeddings()
    head_modules = set(head.modules()) if head is not None else set()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module not in head_modules
        and not (frozen_only and module.weight.requires_grad)
        and module.weight.dtype == torch.float32
    }


def round_matrices(model: Any, keep_exact: bool = False, frozen_only: bool = True) -> dict[str, torch.Tensor]:
    """Round a model's matrices to bfloat16, in place.

    Args:
        model: The model, on any device.
        keep_exact: Whether their float32 values are kept in main memory.
        frozen_only: Whether those that train stay as they are.

    Returns:
        The float32 values by name; empty without `keep_exact`.
    """
    exact_weights: dict[str, torch.Tensor] = {}
    for name, weight in find_matrices(model, frozen_only).items():
        if keep_exact:
            exact_weights[name] = weight.detach().cpu()
        weight.data = weight.data.to(torch.bfloat16)
    return exact_weights


def restore_matrices(model: nn.Module, exact_weights: dict[str, torch.Tensor]) -> None:
    """Put the float32 values back, where they are: in main memory."""
    for name, values in exact_weights.items():
        model.get_parameter(name).data = values
