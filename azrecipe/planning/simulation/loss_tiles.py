"""Tile sizes of chunked losses in Liger, PyTorch and TRL."""

from __future__ import annotations

from azrecipe.modeling.liger_kernels import LOSS_CHUNK_FACTOR

TRL_ROWS = 4096  # trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE
TRL_COLUMNS = 32_768  # trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE


def count_loss_tokens(kind: str, batch: int, length: int) -> int:
    """Count the tokens of a batch that the loss computes logits for.

    TRL leaves out the last token of a sequence. The others compute its logits and ignore them.
    """
    return batch * (length - 1 if kind == "trl" else length)


def count_tile_rows(kind: str, tokens: int, vocabulary: int, width: int) -> int:
    """Count the rows of a logit tile.

    Sources: for liger, liger_kernel/ops/fused_linear_cross_entropy.py with its memory constant of 1, and of
    LOSS_CHUNK_FACTOR for liger_float32, as our trainer asks for it. For torch and accurate, aspect_ratio:2
    and aspect_ratio in torch/nn/modules/linear_cross_entropy_options.py: the first is for bfloat16 on a GPU and float32 on any device, the
    second for bfloat16 on a CPU.

    Args:
        kind: liger, liger_float32, torch, accurate or trl.
        tokens: Tokens that the loss computes logits for.
        vocabulary: Rows of the head.
        width: Columns of the head.
    """
    if kind == "trl":
        return min(tokens, TRL_ROWS)
    parts = LOSS_CHUNK_FACTOR if kind == "liger_float32" else 1
    rows = -(-tokens // -(-vocabulary // (parts * width)))
    power = 1 << (rows - 1).bit_length()
    return max(1, min(power // 2 if kind == "torch" else power, tokens))
