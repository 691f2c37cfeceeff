"""Knows what fused kernels leave in memory: stands in for them in a model whose tensors have shapes only, where no kernel can run.

Each keeps for the backward pass what the real one keeps, and overwrites what the real one overwrites (Liger 0.8, liger_kernel/ops;
PyTorch 2.13, torch/nn/modules/linear_cross_entropy.py; TRL 1.16, trl/kernels/chunked_logprob.py). Liger's rotary embedding has none:
it works in place, and what stays is what stays without it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.parts.tiles import rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from azrecipe.parts.tracker import Tracker


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1/rms (float32, one a row); writes the gradient of x over that of the output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.mul(x, weight.detach().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        grad = grads[0].contiguous().mul_(x)
        return grad, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _GatedProduct(torch.autograd.Function):
    """SwiGLU and GeGLU: keeps gate and up, writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return gate.detach().mul_(grads[0]), up.detach().mul_(grads[0])


class _LayerNorm(torch.autograd.Function):
    """Keeps x, mean and 1/deviation (float32, one a row)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((2, *x.shape[:-1]), dtype=torch.float32))
        return torch.mul(x, weight.detach())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.mul(grads[0], x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@dataclass(frozen=True)
class Head:
    """A head and its loss, computed a tile of the logits at a time. kind: liger, torch or trl."""

    kind: str
    tracker: Tracker
    cuda: bool

    @property
    def early(self) -> bool:
        """Whether gradients are made in the forward pass, and the backward pass only hands them on."""
        return self.kind == "liger"

    def tile(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The logits of some rows, and what is made beside them; the tracker counts it as a tile, and its work for all rows."""
        some = rows(self.kind, x.shape[0], weight.shape[0], weight.shape[1], exact=x.dtype == torch.float32)
        with self.tracker.tile(some / x.shape[0]):
            if self.kind == "trl":
                logits = x.new_empty((some, 32_768))
                if not self.cuda:  # PyTorch's operators on float32 copies, instead of a kernel (_forward_tile, _backward_tile)
                    logits = torch.cat([logits.float()] * 4)
                torch.mm(x[:some], weight.t())
                return logits
            logits = x[:some] @ weight.t()
            return logits if self.kind == "liger" or x.dtype == torch.float32 else logits.float()

    def gradients(self, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, bool]) -> tuple[torch.Tensor | None, ...]:
        """Of x and of the weight, as they are accumulated tile by tile."""
        wide = torch.float32 if self.kind == "trl" else None
        gx = torch.zeros_like(x, dtype=wide) if wanted[0] else None
        gw = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        held = self.tile(x, weight)
        some = min(held.shape[0], x.shape[0])
        with self.tracker.tile(some / x.shape[0]):
            down = held if held.dtype == x.dtype else held.to(x.dtype)
            down = down[:some, : weight.shape[0]]
            if gx is not None:
                down @ weight[: down.shape[1]]
        if gw is not None:
            with self.tracker.work(some / x.shape[0]):
                gw[: down.shape[1]].addmm_(down.t().to(gw.dtype), x[:some].to(gw.dtype))
        return gx, gw


class _Fused(torch.autograd.Function):
    """x [tokens, width], weight [vocabulary, width] → a loss (float32 scalar)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.head, ctx.dtypes = head, (x.dtype, weight.dtype)
        low = (x.to(ctx.dtype), weight.detach().to(ctx.dtype))
        ctx.early = head.early or (head.kind == "torch" and ctx.dtype == torch.float32)
        if ctx.early:
            gx, gw = head.gradients(*low, wanted)
            ctx.save_for_backward(gx, None if gw is None else gw.to(weight.dtype))
        else:
            head.tile(*low)
            ctx.save_for_backward(x, weight, x.new_empty((7 if head.kind == "trl" else 1, x.shape[0]), dtype=torch.float32))
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        if ctx.early:
            gx, gw = ctx.saved_tensors
            return None if gx is None else gx.detach(), None if gw is None else gw.detach(), None
        x, weight, _ = ctx.saved_tensors
        gx, gw = ctx.head.gradients(x.to(ctx.dtype), weight.to(ctx.dtype), ctx.needs_input_grad[:2])
        return None if gx is None else gx.to(ctx.dtypes[0]), None if gw is None else gw.to(ctx.dtypes[1]), None


def fuse_head(model: PreTrainedModel, head: Head) -> None:
    """Let a model's forward, given labels, return a loss alone, made by a stand-in."""

    def forward(self: Any, labels: Any = None, **inputs: Any) -> Any:
        inputs.pop("num_items_in_batch", None)
        hidden = self.base_model(**inputs).last_hidden_state
        output = self.get_output_embeddings()
        weight = output.weight
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return types.SimpleNamespace(loss=_Fused.apply(hidden.flatten(0, -2), weight, head))  # type: ignore[no-untyped-call]

    model.forward = types.MethodType(forward, model)


def fuse_layers(model: PreTrainedModel, kernels: Collection[str]) -> None:
    """Let a model's norms and feed-forward layers run as Liger's would. `kernels`: Liger's names of those that are in use."""
    for module in model.modules():
        kind, put = type(module).__name__, None
        if "rms_norm" in kernels and "RMSNorm" in kind:
            put = _normed(_RMSNorm)
        elif "layer_norm" in kernels and isinstance(module, torch.nn.LayerNorm):
            put = _normed(_LayerNorm)
        elif {"swiglu", "geglu"} & set(kernels) and all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            put = _gated
        if put is not None:
            module.forward = types.MethodType(put, module)


def _normed(function: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function.apply(hidden_states, self.weight)
        return out

    return forward


def _gated(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]
