"""Floating-point operations that training a token takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # a mixture's configuration has one of them


def flops_per_token(model: nn.Module, length: float) -> float | None:
    """Model FLOPs that training needs for a token of a sequence of `length`, for what trains in this model now.

    For each weight of a matrix: 2 forward, 2 for its own gradient where it trains, 2 for the gradient that passes through it to
    what trains below; attention likewise (PaLM, arXiv 2204.02311, appendix B). None for a mixture of experts.
    """
    causal: Any = model
    config = causal.config.get_text_config()
    if any(getattr(config, name, None) for name in EXPERTS):
        return None
    head, table = causal.get_output_embeddings().weight, causal.get_input_embeddings().weight
    body = [p for p in model.parameters() if p is not head and p is not table]
    order = [(0, table.requires_grad), *((_size(p) if p.dim() > 1 else 0, p.requires_grad) for p in body)]
    below = next((i for i, (_, trains) in enumerate(order) if trains), len(order))  # nothing trains below it
    passed = sum(size for size, _ in order[below + 1 :])
    every = sum(size for size, _ in order)
    own = sum(size for size, trains in order if trains)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = 4.0 * config.num_hidden_layers * width * length
    in_head = _size(head) * (2 + 2 * head.requires_grad + 2 * (below < len(order)))
    return float(2 * (every + own + passed) + in_head + attention * (1 + 2 * passed / max(every, 1)))


def _size(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", 0) or parameter.numel())  # DeepSpeed's ZeRO 3 leaves an empty tensor in its place
