"""Knows how many rows of logits a loss that never makes all of them makes at once, as Liger, PyTorch and TRL choose it."""

from __future__ import annotations

TRL_ROWS = 4096  # trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE
TRL_COLUMNS = 32_768  # trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE


def tokens(kind: str, batch: int, length: int) -> int:
    """Of a batch, those that a loss is taken of: TRL leaves the last of a sequence out, and the others ignore what it predicts."""
    return batch * (length - 1 if kind == "trl" else length)


def rows(kind: str, tokens: int, vocabulary: int, width: int) -> int:
    """Rows in a tile. kind: liger, torch, accurate or trl.

    liger: liger_kernel/ops/fused_linear_cross_entropy.py, with its memory constant of 1. torch: aspect_ratio:2 of
    torch/nn/modules/linear_cross_entropy_options.py, which it takes for bfloat16 on a GPU and for float32 anywhere. accurate: its
    aspect_ratio, for bfloat16 on a CPU.
    """
    if kind == "trl":
        return min(tokens, TRL_ROWS)
    share = -(-tokens // -(-vocabulary // width))
    power = 1 << (share - 1).bit_length()
    return max(1, min(power // 2 if kind == "torch" else power, tokens))
