"""Floating-point operations that training a token takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")  # a mixture of experts has one of them in its configuration


def flops_per_token(model: nn.Module, length: float) -> float | None:
    """Count the FLOPs that training needs for a token.

    It counts what trains in this model now. For each weight of a matrix: 2 forward, 2 for its own gradient if it trains, 2 for the
    gradient that passes through it to layers below that train. Attention likewise (PaLM, arXiv 2204.02311, appendix B).

    Args:
        model: A causal language model of transformers.
        length: Tokens in a sequence.

    Returns:
        FLOPs a token, or None for a mixture of experts.
    """
    causal: Any = model
    config = causal.config.get_text_config()
    if any(getattr(config, name, None) for name in EXPERT_COUNT_KEYS):
        return None
    head, table = causal.get_output_embeddings().weight, causal.get_input_embeddings().weight
    body = [p for p in model.parameters() if p is not head and p is not table]
    weights = [(0, table.requires_grad), *((_size(p) if p.dim() > 1 else 0, p.requires_grad) for p in body)]
    first_trained = next((i for i, (_, trains) in enumerate(weights) if trains), len(weights))  # nothing below it trains
    crossed = sum(size for size, _ in weights[first_trained + 1 :])
    total = sum(size for size, _ in weights)
    trained = sum(size for size, trains in weights if trains)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = 4.0 * config.num_hidden_layers * width * length
    in_head = _size(head) * (2 + 2 * head.requires_grad + 2 * (first_trained < len(weights)))
    return float(2 * (total + trained + crossed) + in_head + attention * (1 + 2 * crossed / max(total, 1)))


def _size(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", 0) or parameter.numel())  # DeepSpeed's ZeRO 3 leaves an empty tensor here
