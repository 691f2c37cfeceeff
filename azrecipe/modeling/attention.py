"""Attention over packed documents without a mask, by PyTorch's variable-length kernel.

`torch.nn.attention.varlen` is in every CUDA build of PyTorch from 2.10 on and runs FlashAttention. transformers makes a mask only for
an attention that has a mask function. This one has none, so no mask of [tokens, tokens] exists: the collator says where documents begin.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from azrecipe.recipe.attention_kinds import AUTO, FLEX, ONLY_CAUSAL, VARLEN, find_width_problem

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class VarlenKernel:
    """PyTorch's kernel, and which keyword arguments this release's has."""

    function: Callable[..., Any]
    causal: Mapping[str, Any]
    takes_scale: bool
    takes_groups: bool


_kernel: VarlenKernel | None = None  # read once: torch.compile cannot trace through the reading of a signature


@contextlib.contextmanager
def disable_cudnn_attention() -> Iterator[None]:
    """Keep PyTorch from cuDNN's attention, which plans anew for every length.

    Decoding has another length at every token.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def prepare_attention(name: str) -> str | None:
    """Register a recipe's attention with transformers; may be called again.

    Returns the name that transformers takes: None for `auto`, where it chooses by itself.
    """
    if name == AUTO:
        return None
    if name == VARLEN:
        register_varlen()
    return name


def register_varlen() -> None:
    """Make `attn_implementation="varlen"` known to transformers."""
    global _kernel
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, attend_varlen)
    if _kernel is None and importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters
        causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}  # (-1, 0) is causal
        _kernel = VarlenKernel(varlen_attn, causal, "scale" in parameters, "enable_gqa" in parameters)


def find_model_obstacles(meta_model: PreTrainedModel) -> dict[str, str]:
    """Find why a model cannot run kinds of attention, by kind.

    A forward pass on PyTorch's meta device, which costs nothing, shows what each layer asks of its attention.

    Args:
        meta_model: The model on the meta device.

    Returns:
        The reason for each kind that the model cannot run; `flash` stands for all kinds of flash attention.
    """
    model_type = meta_model.config.model_type
    obstacles = {
        kind: f"transformers' {model_type} does not support it"
        for kind, supports in {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", FLEX: "_supports_flex_attn"}.items()
        if not getattr(meta_model, supports, False)
    }
    requests = _record_requests(meta_model)
    if requests is None:
        return obstacles | {VARLEN: f"a {model_type}'s attention does not all go through transformers' interface"}
    features = sorted({feature for request in requests for feature in request.features})
    if features:
        obstacles[VARLEN] = f"a {model_type}'s attention has {' and '.join(features)}, and {ONLY_CAUSAL}"
    elif problem := next((problem for request in requests if (problem := request.find_width_problem())), ""):
        obstacles[VARLEN] = problem
    if DROPOUT in features:
        obstacles |= dict.fromkeys((FLEX, "flash_attention_3"), f"a {model_type}'s attention has {DROPOUT}, which it lacks")
    if SOFT_CAP in features:
        obstacles["sdpa"] = f"a {model_type}'s attention has {SOFT_CAP}, which it lacks"
    return obstacles


def find_common_obstacles(meta_models: Iterable[PreTrainedModel]) -> dict[str, str]:
    """Find why one of several models cannot run kinds of attention, by kind."""
    obstacles: dict[str, str] = {}
    for meta_model in meta_models:
        obstacles = find_model_obstacles(meta_model) | obstacles
    return obstacles


DROPOUT, SOFT_CAP = "dropout", "a soft cap"
_FEATURES = {"sliding_window": "a sliding window", "softcap": SOFT_CAP, "s_aux": "sinks", "position_bias": "a bias of positions"}
_RECORDER = "azrecipe_recorder"


class _AttentionRequest(NamedTuple):
    """A layer's request of its attention: features, and widths of a head."""

    features: tuple[str, ...]
    query_width: int
    value_width: int

    def find_width_problem(self) -> str:
        if self.query_width != self.value_width:
            return (
                f"its heads are {self.query_width} wide for queries and {self.value_width} for values, and FlashAttention takes one width"
            )
        return find_width_problem(self.query_width)


def _record_requests(meta_model: PreTrainedModel) -> list[_AttentionRequest] | None:
    """Record what each layer asks; None where a layer asks nothing."""
    from transformers import AttentionInterface

    requests: list[_AttentionRequest] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **more: Any) -> tuple[Tensor, None]:
        features = [feature for argument, feature in _FEATURES.items() if more.get(argument) is not None]
        if more.get("dropout"):
            features.append(DROPOUT)
        causal = more.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            features.append("no causal order")
        requests.append(_AttentionRequest(tuple(features), query.shape[-1], value.shape[-1]))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_RECORDER, record)
    before, was_training = meta_model.config._attn_implementation, meta_model.training
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        meta_model.set_attn_implementation(_RECORDER)
        with torch.no_grad():
            meta_model.train()(input_ids=tokens, position_ids=torch.arange(8, device="meta")[None], use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError):
        return None
    finally:
        meta_model.set_attn_implementation(before)
        meta_model.train(was_training)
    return requests if len(requests) == meta_model.config.get_text_config().num_hidden_layers else None


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
