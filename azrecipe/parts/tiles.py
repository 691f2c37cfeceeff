"""Knows how many rows of logits a loss that never makes all of them makes at once, as Liger, PyTorch and TRL choose it."""

from __future__ import annotations

TRL_ROWS = 4096  # trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE


def rows(kind: str, tokens: int, vocabulary: int, width: int, exact: bool = False) -> int:
    """Rows in a tile. kind: liger, torch or trl. `exact`: the arithmetic is float32's.

    liger: liger_kernel/ops/fused_linear_cross_entropy.py, with its memory constant of 1. torch: aspect_ratio:2 of
    torch/nn/modules/linear_cross_entropy_options.py, which it takes for bfloat16 on a GPU and for float32 anywhere.
    """
    if kind == "trl":
        return min(tokens, TRL_ROWS)
    share = -(-tokens // -(-vocabulary // width))
    power = 1 << (share - 1).bit_length()
    return max(1, min(power if kind == "liger" else power // 2, tokens))
