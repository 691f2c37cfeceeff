"""Knows what fused kernels leave in memory: stands in for them in a model whose tensors have shapes only, where no kernel can run.

Each keeps for the backward pass what the real one keeps, and overwrites what the real one overwrites (Liger 0.8, liger_kernel/ops;
PyTorch 2.13, torch/nn/modules/linear_cross_entropy.py; TRL 1.16, trl/kernels/chunked_logprob.py). Liger's rotary embedding has none:
it works in place, and what stays is what stays without it. bitsandbytes' formats are from its documentation: it is not installed here.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.planning.simulation.loss_tiles import TRL_COLUMNS, rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from azrecipe.planning.simulation.memory_tracker import Tracker


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
    """A head and its loss, computed a tile of the logits at a time. kind: liger, torch, accurate (torch's on a CPU) or trl."""

    kind: str
    tracker: Tracker
    cuda: bool

    def rows(self, x: torch.Tensor, weight: torch.Tensor) -> int:
        """In a tile, of x [tokens, width] and weight [vocabulary, width]."""
        return rows(self.kind, x.shape[0], weight.shape[0], weight.shape[1])

    def times(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, some: int) -> None:
        """What a product into `out` [m, n] takes, with tiles of `some` rows: none is made, as the real ones work on types that a CPU's do not."""
        m, n = out.shape
        self.tracker.did(2 * m * n * a.shape[1], (a, b, out), some)


class _Liger(torch.autograd.Function):
    """Makes the gradients in the forward pass; the backward pass hands them on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
        low = (_low(x), _low(weight.detach()))
        gx = torch.zeros_like(low[0])
        gw = torch.zeros_like(low[1]) if ctx.needs_input_grad[1] else None
        some = head.rows(x, weight)
        part = low[0][:some]
        with head.tracker.tile(some / x.shape[0]):
            logits = part.new_empty(some, weight.shape[0])
            head.times(part, low[1], logits, some)
            head.times(logits, low[1].t(), gx[:some], some)
        if gw is not None:
            with head.tracker.work(some / x.shape[0]):
                head.times(logits.t(), part.t(), gw, some)
        ctx.save_for_backward(gx, None if gw is None else gw.to(weight.dtype))
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gx, gw = ctx.saved_tensors
        return gx.detach(), None if gw is None else gw.detach(), None


class _Torch(torch.autograd.Function):
    """In float32 the gradients are made in the forward pass; else the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
        ctx.head = head
        if x.dtype == torch.float32:
            ctx.made = _torch_tiles(head, x, weight, ctx.needs_input_grad[:2])
            return x.new_zeros(())
        ctx.save_for_backward(x, weight)
        _torch_tiles(head, x, weight, (False, False))
        return x.new_empty(x.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if not ctx.saved_tensors:
            made, ctx.made = ctx.made, None
            _zeros = [torch.zeros_like(gradient) for gradient in made if gradient is not None]  # autograd's, as they are outputs
            return *(None if gradient is None else gradient.mul_(grads[0]) for gradient in made), None
        x, weight = ctx.saved_tensors
        return *_torch_tiles(ctx.head, x, weight, ctx.needs_input_grad[:2]), None


def _torch_tiles(
    head: Head, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The loop over the tiles: policy compact, and on a CPU below float32 accurate, which works on float32 copies."""
    accurate, low, some = head.kind == "accurate", x.dtype != torch.float32, head.rows(x, weight)
    with head.tracker.tile(some / x.shape[0]):
        logits = x.new_empty((some, weight.shape[0]), dtype=torch.float32)
    gx = torch.empty_like(x, dtype=torch.float32 if accurate else None) if wanted[0] else None
    gw = torch.zeros_like(weight) if wanted[1] else None
    scratch = torch.empty_like(weight, dtype=torch.float32) if wanted[1] and accurate else gw
    used = weight.float() if accurate else weight
    # The rows' weights and targets
    _masks = x.new_empty((1, x.shape[0]), dtype=torch.float32), x.new_empty((2, x.shape[0]), dtype=torch.long)
    with head.tracker.tile(some / x.shape[0]):
        part = x[:some].float() if low and (accurate or wanted[1]) else x[:some]
        head.times(part, used, logits, some)
        for _ in ("less the largest", "exponents", "over their sum"):
            logits.mul_(1)
        down = logits.to(x.dtype) if low and not accurate and any(wanted) else logits
        if gx is not None:
            own = used.new_empty((some, weight.shape[1]))
            own.mul(1)
            del own
            head.times(down, used.t(), gx[:some], some)
    if scratch is not None:
        with head.tracker.work(some / x.shape[0]):
            head.times(down.t(), part.t(), scratch, some)
        if accurate:  # taken from a bfloat16 gradient, for which a CPU makes float32 copies
            scratch.new_empty((2, *scratch.shape))
    return None if gx is None else gx.to(x.dtype), gw


class _TRL(torch.autograd.Function):
    """The backward pass makes the logits again, and adds gradients up in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
        ctx.head = head
        ctx.save_for_backward(x, weight, x.new_empty((2, x.shape[0]), dtype=torch.float32))
        ctx.dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        _statistics = x.new_empty((7, x.shape[0]), dtype=torch.float32)
        _trl_tiles(head, (x, weight, ctx.dtype), None, None)
        return x.new_empty((3, x.shape[0]), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        gx = torch.zeros_like(x, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        gw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _trl_tiles(ctx.head, (x, weight, ctx.dtype), gx, gw)
        return None if gx is None else gx.to(x.dtype), None if gw is None else gw.to(weight.dtype), None


def _trl_tiles(head: Head, given: tuple[torch.Tensor, torch.Tensor, torch.dtype], gx: torch.Tensor | None, gw: torch.Tensor | None) -> None:
    """The loop over the tiles, each of TRL_COLUMNS columns; on a CPU with what PyTorch's operators make beside one, for want of a kernel."""
    x, weight, dtype = given
    some, columns = head.rows(x, weight), min(TRL_COLUMNS, weight.shape[0])
    with head.tracker.tile(some / x.shape[0]):
        buffer = x.new_empty((some, TRL_COLUMNS), dtype=dtype)
    with head.tracker.tile(some / x.shape[0]):
        part = x[:some].to(dtype)
    with head.tracker.work(columns / weight.shape[0]):
        its = weight[:columns].to(dtype)
        with head.tracker.tile(some / x.shape[0] * columns / weight.shape[0]):
            logits = buffer[:, :columns]
            head.times(part, its, logits, some)
            if not head.cuda:  # float32 tensors and a bool one, the size of a tile, that are there at once (_forward_tile, _backward_tile)
                copies = 13 if gx is None and gw is None else 29
                torch.empty((some, columns * copies), dtype=torch.uint8)
            logits.mul_(1)
        low = not head.cuda and dtype != torch.float32 and not (gx is None and gw is None)
        with head.tracker.tile(some / x.shape[0] * columns / weight.shape[0]):
            _copy = logits.float() if low else None
        _its = its.float() if low else None
        if gx is not None:
            with head.tracker.tile(some / x.shape[0] * columns / weight.shape[0]):
                head.times(logits, its.t(), gx[:some], some)
        if gw is not None:
            with head.tracker.work(some / x.shape[0] * columns / weight.shape[0]):
                head.times(logits.t(), part.t(), gw[:columns], some)


def _low(tensor: torch.Tensor) -> torch.Tensor:
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _loss(head: Head, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """hidden [batch, length, width] → a loss, with what is done around the kernels."""
    if head.kind == "liger":
        return _Liger.apply(hidden.flatten(0, -2), weight, head)  # type: ignore[no-untyped-call, no-any-return]
    if head.kind == "trl":
        x = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        if head.cuda:  # rows without a label are left out, which takes a copy
            x = x.index_select(0, torch.zeros(x.shape[0], dtype=torch.long))
        return _TRL.apply(x, weight, head).sum()  # type: ignore[no-untyped-call, no-any-return]
    _following = torch.nn.functional.pad(labels, (0, 1))[..., 1:].contiguous()
    return _Torch.apply(_low(hidden).flatten(0, -2), _low(weight), head).float().sum()  # type: ignore[no-untyped-call, no-any-return]


def fuse_head(model: PreTrainedModel, head: Head) -> None:
    """Let a model's forward, given labels, return a loss alone, made by a stand-in."""
    head.tracker.more_tiles = head.kind == "trl"

    def forward(self: Any, labels: Any = None, **inputs: Any) -> Any:
        inputs.pop("num_items_in_batch", None)
        hidden = self.base_model(**inputs).last_hidden_state
        weight = self.get_output_embeddings().weight
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        return types.SimpleNamespace(loss=_loss(head, hidden, weight, labels))

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


class Bitsandbytes(torch.optim.Optimizer):
    """Keeps what bitsandbytes' optimizers keep: moments in a byte a number with a float32 for each 256, or in float32.

    In float32 are those of parameters with fewer than 4,096 numbers and, as transformers wants it, of embeddings.
    """

    def __init__(self, model: torch.nn.Module, moments: int, bits: int) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        embeddings = {id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
        self.moments, self.wide = moments, embeddings if bits == 8 else {id(p) for p in model.parameters()}

    def step(self, closure: Any = None) -> Any:
        """Change each parameter in place, from its gradient and its moments."""
        for parameter in self.param_groups[0]["params"]:
            own = getattr(parameter, "_local_tensor", parameter).detach()
            state = self.state[parameter]
            if not state:
                wide = id(parameter) in self.wide or own.numel() < 4096
                for nth in range(self.moments):
                    state[f"state{nth + 1}"] = torch.empty_like(own, dtype=torch.float32 if wide else torch.uint8)
                    if not wide:
                        state[f"absmax{nth + 1}"] = own.new_empty(-(-own.numel() // 256), dtype=torch.float32)
            for held in (own, *state.values()):
                held.mul_(1)


class _Product4(torch.autograd.Function):
    """x times a matrix of `shape` that is unpacked for each product and not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ _unpacked(packed, shape, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return grads[0] @ _unpacked(packed, ctx.shape, grads[0].dtype), None, None


def _unpacked(packed: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return packed.new_zeros(shape, dtype=dtype)


class _Linear4(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Product4.apply(_low(x), self.weight, (self.out_features, self.in_features))  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


def quantize(model: PreTrainedModel) -> None:
    """Let a model's linear layers, but for its head, lie in 4 bits (NF4, double quantisation), frozen.

    Half a byte a number, a byte for each 64 of them, and a float32 for each 256 of those bytes.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not head:
            blocks = -(-module.weight.numel() // 64)
            size = -(-module.weight.numel() // 2) + blocks + 4 * -(-blocks // 256)
            module.weight = torch.nn.Parameter(module.weight.new_empty((size, 1), dtype=torch.uint8), requires_grad=False)
            module.__class__ = _Linear4
