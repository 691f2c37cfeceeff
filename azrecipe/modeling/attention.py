"""Attention over packed documents without a mask, by PyTorch's variable-length kernel.

`torch.nn.attention.varlen` is in every CUDA build of PyTorch from 2.10 on and runs FlashAttention. transformers makes a mask only for
an attention that has a mask function. This one has none, so no mask of [tokens, tokens] exists: the collator says where documents begin.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from azrecipe.data.packing import VARLEN
from azrecipe.errors import CannotRun

if TYPE_CHECKING:
    from torch import Tensor

MIN_CAPABILITY = (8, 0)  # of a GPU: FlashAttention needs Ampere or newer


@dataclass(frozen=True)
class VarlenKernel:
    """PyTorch's kernel, and which keyword arguments this release's has."""

    function: Callable[..., Any]
    causal: Mapping[str, Any]
    takes_scale: bool
    takes_groups: bool


_kernel: VarlenKernel | None = None  # read once: torch.compile cannot trace through the reading of a signature


def register_varlen() -> None:
    """Make `attn_implementation="varlen"` known to transformers; may be called again."""
    global _kernel
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, attend_varlen)
    if _kernel is None and importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters
        causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}  # (-1, 0) is causal
        _kernel = VarlenKernel(varlen_attn, causal, "scale" in parameters, "enable_gqa" in parameters)


def find_varlen_obstacle() -> str:
    """Say why the kernel cannot run on this machine's GPU, or "".

    On a CPU the same numbers come from a loop, for tests.
    """
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen: torch 2.10 or newer"
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < MIN_CAPABILITY:
        return f"a {torch.cuda.get_device_name()} has compute capability {major}.{minor}, and FlashAttention needs 8.0 or newer"
    return ""


def check_attention(attn_implementation: str, precision: str) -> None:
    """Raise CannotRun for an attention that cannot run here, before anything is read."""
    if attn_implementation == VARLEN and (reason := find_varlen_obstacle()):
        raise CannotRun(f"attn_implementation: {VARLEN}: {reason}, or --set model.attn_implementation=sdpa")
    half_only = attn_implementation == VARLEN or attn_implementation.startswith("flash_attention")
    if half_only and precision == "float32" and torch.cuda.is_available():
        raise CannotRun(
            f"attn_implementation: {attn_implementation} computes in bfloat16 only, and precision: float32 asks for float32: "
            "--set training.precision=bf16_mixed, or --set model.attn_implementation=sdpa"
        )


def attend_varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attend within documents: transformers' attention interface.

    Without borders each row is one document, which padding at its end does not change.

    Args:
        module: The attention layer.
        query: [rows, heads, tokens, width].
        key: [rows, key heads, tokens, width]; longer than query with a key-value cache.
        value: As key.
        attention_mask: Not used.
        **more: `scaling`, and the documents' borders from the collator.

    Returns:
        [rows, tokens, heads, width], and None for the weights.
    """
    scale = more.get("scaling")
    if key.shape[2] != query.shape[2]:  # a key-value cache: one token, or a few, after what is there
        return _attend_cached(query, key, value, scale), None
    rows, heads, tokens, width = query.shape
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    q, k, v = (x.transpose(1, 2).reshape(rows * tokens, x.shape[1], width).to(dtype) for x in (query, key, value))
    borders, longest = more.get("cu_seq_lens_q"), more.get("max_length_q")
    if borders is None or longest is None:
        borders = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=query.device)
        longest = tokens
    attend = _attend_kernel if query.device.type == "cuda" else _attend_loop
    return attend((q, k, v), borders, longest, scale).view(rows, tokens, heads, width), None


def _attend_cached(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend with a cache: each query sees the keys before it."""
    tokens, length = query.shape[2], key.shape[2]
    visible = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens) if tokens > 1 else None
    grouped = query.shape[1] != key.shape[1]
    return (
        F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=grouped).transpose(1, 2).contiguous()
    )


Heads = tuple["Tensor", "Tensor", "Tensor"]  # query, key and value: [tokens, heads, width]; key and value may have fewer heads


def _attend_kernel(parts: Heads, borders: Tensor, longest: int, scale: float | None) -> Tensor:
    """Run the kernel, which takes bfloat16 and float16 only; returns [tokens, heads, width]."""
    query, key, value = parts
    kernel = _kernel
    assert kernel is not None
    if scale is not None and not kernel.takes_scale:
        query, scale = query * (scale * query.shape[-1] ** 0.5), None
    more: dict[str, Any] = {} if scale is None else {"scale": scale}
    if kernel.takes_groups:
        more["enable_gqa"] = query.shape[1] != key.shape[1]
    attended: Tensor = kernel.function(query, key, value, borders, borders, longest, longest, **kernel.causal, **more)
    return attended


def _attend_loop(parts: Heads, borders: Tensor, longest: int, scale: float | None) -> Tensor:
    """Attend one document after the other, as tests on a CPU do."""
    grouped, attended = parts[0].shape[1] != parts[1].shape[1], []
    for begin, end in pairwise(borders.tolist()):
        query, key, value = (x[begin:end].transpose(0, 1)[None] for x in parts)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        attended.append(out[0].transpose(0, 1))
    return torch.cat(attended)
