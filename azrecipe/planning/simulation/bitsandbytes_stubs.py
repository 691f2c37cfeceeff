"""Stubs of bitsandbytes' optimizers and layers, for tensors without values.

Their formats are from bitsandbytes' documentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from azrecipe.planning.simulation.kernel_stubs import to_autocast_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BitsandbytesOptimizer(torch.optim.Optimizer):
    """The state of bitsandbytes' optimizers.

    In 8 bits, a moment is a byte for each number and a float32 for each 256 numbers. Moments of parameters with fewer than 4,096 numbers
    are float32, and those of embeddings too, as transformers sets it.
    """

    def __init__(self, model: torch.nn.Module, moments: int, bits: int) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        embeddings = {id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
        self.moments, self.float32_ids = moments, embeddings if bits == 8 else {id(p) for p in model.parameters()}

    def step(self, closure: Any = None) -> Any:
        """Update each parameter in place."""
        for parameter in self.param_groups[0]["params"]:
            local = getattr(parameter, "_local_tensor", parameter).detach()
            state = self.state[parameter]
            if not state:
                is_float32 = id(parameter) in self.float32_ids or local.numel() < 4096
                for moment in range(1, self.moments + 1):
                    state[f"state{moment}"] = torch.empty_like(local, dtype=torch.float32 if is_float32 else torch.uint8)
                    if not is_float32:
                        state[f"absmax{moment}"] = local.new_empty(-(-local.numel() // 256), dtype=torch.float32)
            for tensor in (local, *state.values()):
                tensor.mul_(1)


class _Product4Bit(torch.autograd.Function):
    """x times a packed matrix, which is unpacked for each product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ _unpack(packed, shape, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return grads[0] @ _unpack(packed, ctx.shape, grads[0].dtype), None, None


def _unpack(packed: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return packed.new_zeros(shape, dtype=dtype)


class _Linear4Bit(torch.nn.Linear):
    """A linear layer with weights in 4 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        out: torch.Tensor = _Product4Bit.apply(to_autocast_dtype(x), self.weight, shape)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


def quantize_model(model: PreTrainedModel) -> None:
    """Quantize a model's linear layers to 4 bits and freeze them.

    Not its head. NF4 with double quantization is half a byte a number, a byte for each 64 numbers, and a float32 for each 256 of those
    bytes.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not head:
            blocks = -(-module.weight.numel() // 64)
            size = -(-module.weight.numel() // 2) + blocks + 4 * -(-blocks // 256)
            module.weight = torch.nn.Parameter(module.weight.new_empty((size, 1), dtype=torch.uint8), requires_grad=False)
            module.__class__ = _Linear4Bit
