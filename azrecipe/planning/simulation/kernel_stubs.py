"""Stubs of fused kernels, for tensors without values.

No kernel can run on such tensors. Each stub keeps for the backward pass what the real kernel keeps, and overwrites what it overwrites
(Liger 0.8, liger_kernel/ops; PyTorch 2.13, torch/nn/modules/linear_cross_entropy.py; TRL 1.16, trl/kernels/chunked_logprob.py). Liger's
rotary embedding needs no stub: it works in place and keeps the same memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.planning.simulation.loss_tiles import TRL_COLUMNS, count_tile_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from azrecipe.planning.simulation.memory_tracker import MemoryTracker


class _RMSNorm(torch.autograd.Function):
    """Liger's RMSNorm: keeps x and 1/rms.

    1/rms is float32, one a row. The gradient of x is written over that of the output.
    """

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
    """Liger's SwiGLU and GeGLU: keeps gate and up, overwritten by their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return gate.detach().mul_(grads[0]), up.detach().mul_(grads[0])


class _LayerNorm(torch.autograd.Function):
    """Liger's LayerNorm: keeps x, mean and 1/deviation (float32, one a row)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((2, *x.shape[:-1]), dtype=torch.float32))
        return torch.mul(x, weight.detach())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.mul(grads[0], x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@dataclass(frozen=True)
class LossHead:
    """A head whose loss is computed a tile at a time.

    kind: liger, torch, accurate (torch's on a CPU) or trl.
    """

    kind: str
    tracker: MemoryTracker
    cuda: bool

    def count_tile_rows(self, x: torch.Tensor, weight: torch.Tensor) -> int:
        """Count the rows of a tile.

        Args:
            x: Hidden states [tokens, width].
            weight: The head [vocabulary, width].
        """
        return count_tile_rows(self.kind, x.shape[0], weight.shape[0], weight.shape[1])

    def record_product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile_rows: int) -> None:
        """Record a matrix product without computing it.

        A CPU lacks the dtypes of the real one.

        Args:
            a: Left matrix [m, k].
            b: Right matrix [k, n] or [n, k].
            out: The product [m, n].
            tile_rows: Rows of a tile.
        """
        m, n = out.shape
        self.tracker.record_op(2 * m * n * a.shape[1], (a, b, out), tile_rows)


class _Liger(torch.autograd.Function):
    """Liger's head: the forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: LossHead) -> torch.Tensor:
        hidden, table = to_autocast_dtype(x), to_autocast_dtype(weight.detach())
        gx = torch.zeros_like(hidden)
        sum_dtype = torch.float32 if head.kind == "liger_float32" else table.dtype
        gw = torch.zeros_like(table, dtype=sum_dtype) if ctx.needs_input_grad[1] else None
        tile_rows = head.count_tile_rows(x, weight)
        part = hidden[:tile_rows]
        with head.tracker.within_tile(tile_rows / x.shape[0]):
            logits = part.new_empty(tile_rows, weight.shape[0])
            head.record_product(part, table, logits, tile_rows)
            head.record_product(logits, table.t(), gx[:tile_rows], tile_rows)
        if gw is not None:
            with head.tracker.scale_work(tile_rows / x.shape[0]):
                head.record_product(logits.t(), part.t(), gw, tile_rows)
        ctx.save_for_backward(gx, None if gw is None else gw.to(weight.dtype))
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gx, gw = ctx.saved_tensors
        return gx.detach(), None if gw is None else gw.detach(), None


class _Torch(torch.autograd.Function):
    """PyTorch's head.

    In float32 the forward pass computes the gradients; else the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: LossHead) -> torch.Tensor:
        ctx.head = head
        if x.dtype == torch.float32:
            ctx.gradients = _run_torch_tiles(head, x, weight, ctx.needs_input_grad[:2])
            return x.new_zeros(())
        ctx.save_for_backward(x, weight)
        _run_torch_tiles(head, x, weight, (False, False))
        return x.new_empty(x.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if not ctx.saved_tensors:
            gradients, ctx.gradients = ctx.gradients, None
            _zeros = [torch.zeros_like(gradient) for gradient in gradients if gradient is not None]  # autograd's: they are outputs
            return *(None if gradient is None else gradient.mul_(grads[0]) for gradient in gradients), None
        x, weight = ctx.saved_tensors
        return *_run_torch_tiles(ctx.head, x, weight, ctx.needs_input_grad[:2]), None


def _run_torch_tiles(
    head: LossHead, x: torch.Tensor, weight: torch.Tensor, needs_grad: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Run PyTorch's loop over tiles; return the gradients.

    The policy is compact; accurate, for 16 bits on a CPU, works on float32 copies.
    """
    accurate, is_16_bit, tile_rows = head.kind == "accurate", x.dtype != torch.float32, head.count_tile_rows(x, weight)
    with head.tracker.within_tile(tile_rows / x.shape[0]):
        logits = x.new_empty((tile_rows, weight.shape[0]), dtype=torch.float32)
    gx = torch.empty_like(x, dtype=torch.float32 if accurate else None) if needs_grad[0] else None
    gw = torch.zeros_like(weight) if needs_grad[1] else None
    scratch = torch.empty_like(weight, dtype=torch.float32) if needs_grad[1] and accurate else gw
    used = weight.float() if accurate else weight
    # Weights and targets of the rows
    _masks = x.new_empty((1, x.shape[0]), dtype=torch.float32), x.new_empty((2, x.shape[0]), dtype=torch.long)
    with head.tracker.within_tile(tile_rows / x.shape[0]):
        part = x[:tile_rows].float() if is_16_bit and (accurate or needs_grad[1]) else x[:tile_rows]
        head.record_product(part, used, logits, tile_rows)
        for _ in ("subtract the maximum", "exponentiate", "divide by the sum"):
            logits.mul_(1)
        down = logits.to(x.dtype) if is_16_bit and not accurate and any(needs_grad) else logits
        if gx is not None:
            rows = used.new_empty((tile_rows, weight.shape[1]))
            rows.mul(1)
            del rows
            head.record_product(down, used.t(), gx[:tile_rows], tile_rows)
    if scratch is not None:
        with head.tracker.scale_work(tile_rows / x.shape[0]):
            head.record_product(down.t(), part.t(), scratch, tile_rows)
        if accurate:  # a CPU subtracts it from a bfloat16 gradient with float32 copies of both
            scratch.new_empty((2, *scratch.shape))
    return None if gx is None else gx.to(x.dtype), gw


class _TRL(torch.autograd.Function):
    """TRL's head: computes logits twice and sums gradients in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: LossHead) -> torch.Tensor:
        ctx.head = head
        ctx.save_for_backward(x, weight, x.new_empty((2, x.shape[0]), dtype=torch.float32))
        ctx.dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        _statistics = x.new_empty((7, x.shape[0]), dtype=torch.float32)
        _run_trl_tiles(head, x, weight, dtype=ctx.dtype, gx=None, gw=None)
        return x.new_empty((3, x.shape[0]), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        gx = torch.zeros_like(x, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        gw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _run_trl_tiles(ctx.head, x, weight, dtype=ctx.dtype, gx=gx, gw=gw)
        return None if gx is None else gx.to(x.dtype), None if gw is None else gw.to(weight.dtype), None


def _run_trl_tiles(
    head: LossHead, x: torch.Tensor, weight: torch.Tensor, *, dtype: torch.dtype, gx: torch.Tensor | None, gw: torch.Tensor | None
) -> None:
    """Run TRL's loop over the tiles, each of TRL_COLUMNS columns.

    A CPU has no kernel for it: there PyTorch's operators compute temporary tensors too. gx, gw: gradients to write, if any.
    """
    tile_rows, columns = head.count_tile_rows(x, weight), min(TRL_COLUMNS, weight.shape[0])
    with head.tracker.within_tile(tile_rows / x.shape[0]):
        buffer = x.new_empty((tile_rows, TRL_COLUMNS), dtype=dtype)
    with head.tracker.within_tile(tile_rows / x.shape[0]):
        part = x[:tile_rows].to(dtype)
    with head.tracker.scale_work(columns / weight.shape[0]):
        columns_weight = weight[:columns].to(dtype)
        with head.tracker.within_tile(tile_rows / x.shape[0] * columns / weight.shape[0]):
            logits = buffer[:, :columns]
            head.record_product(part, columns_weight, logits, tile_rows)
            if not head.cuda:  # float32 tensors and a bool one of the size of a tile that live at once (_forward_tile, _backward_tile)
                copies = 13 if gx is None and gw is None else 29
                torch.empty((tile_rows, columns * copies), dtype=torch.uint8)
            logits.mul_(1)
        needs_float32 = not head.cuda and dtype != torch.float32 and not (gx is None and gw is None)
        with head.tracker.within_tile(tile_rows / x.shape[0] * columns / weight.shape[0]):
            _copy = logits.float() if needs_float32 else None
        _weight_copy = columns_weight.float() if needs_float32 else None
        if gx is not None:
            with head.tracker.within_tile(tile_rows / x.shape[0] * columns / weight.shape[0]):
                head.record_product(logits, columns_weight.t(), gx[:tile_rows], tile_rows)
        if gw is not None:
            with head.tracker.scale_work(tile_rows / x.shape[0] * columns / weight.shape[0]):
                head.record_product(logits.t(), part.t(), gw[:columns], tile_rows)


def to_autocast_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor as autocast does for a product."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _compute_loss(head: LossHead, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute a loss with the steps around the kernels.

    Args:
        head: The head's stub.
        hidden: [batch, length, width].
        weight: [vocabulary, width].
        labels: [batch, length].
    """
    if head.kind.startswith("liger"):
        return _Liger.apply(hidden.flatten(0, -2), weight, head)  # type: ignore[no-untyped-call, no-any-return]
    if head.kind == "trl":
        x = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        if head.cuda:  # TRL leaves out rows without a label, with a copy
            x = x.index_select(0, torch.zeros(x.shape[0], dtype=torch.long))
        return _TRL.apply(x, weight, head).sum()  # type: ignore[no-untyped-call, no-any-return]
    _following = torch.nn.functional.pad(labels, (0, 1))[..., 1:].contiguous()
    x, table = to_autocast_dtype(hidden).flatten(0, -2), to_autocast_dtype(weight)
    return _Torch.apply(x, table, head).float().sum()  # type: ignore[no-untyped-call, no-any-return]


def fuse_head(model: PreTrainedModel, head: LossHead) -> None:
    """Let a model's forward return only a loss, computed by a stub."""
    head.tracker.more_tiles = head.kind == "trl"

    def forward(self: Any, labels: Any = None, **inputs: Any) -> Any:
        inputs.pop("num_items_in_batch", None)
        hidden = self.base_model(**inputs).last_hidden_state
        weight = self.get_output_embeddings().weight
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return types.SimpleNamespace(loss=_compute_loss(head, hidden, weight, labels))

    model.forward = types.MethodType(forward, model)


def fuse_layers(model: PreTrainedModel, kernels: Collection[str]) -> None:
    """Replace a model's norms and feed-forward layers by Liger's stubs.

    kernels: Liger's names of the kernels that are on.
    """
    for module in model.modules():
        class_name, forward = type(module).__name__, None
        if "rms_norm" in kernels and "RMSNorm" in class_name:
            forward = _make_norm_forward(_RMSNorm)
        elif "layer_norm" in kernels and isinstance(module, torch.nn.LayerNorm):
            forward = _make_norm_forward(_LayerNorm)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")) and _get_gated_kernel(module) in kernels:
            forward = _forward_gated
        if forward is not None:
            module.forward = types.MethodType(forward, module)


def _get_gated_kernel(module: torch.nn.Module) -> str:
    """Return the name of Liger's kernel for a gated layer, by its activation."""
    return "geglu" if "gelu" in type(getattr(module, "act_fn", None)).__name__.lower() else "swiglu"


def _make_norm_forward(function: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function.apply(hidden_states, self.weight)
        return out

    return forward


def _forward_gated(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]


def register_collectives() -> None:
    """Let collectives of a fake process group take fake tensors.

    torch 2.11 and newer do so by themselves; in older ones a module does it when it is imported.
    """
    if importlib.util.find_spec("torch.distributed._meta_registrations") is None:
        importlib.import_module("torch.distributed._tools.fake_collectives")
