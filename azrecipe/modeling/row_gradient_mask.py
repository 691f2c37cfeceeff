"""Keeps a matrix' gradient to some of its rows, whole on one process or sharded over several: the others never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from azrecipe.modeling.parameter_groups import Trained, rows_of

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


class RowMask(TrainerCallback):  # type: ignore[misc]
    """Masks the matrices of which a phase trains the new rows only, for as long as one Trainer trains.

    The gradient of every other row is 0 before it is clipped, so an optimizer that neither decays these weights (`parameter_groups.decayed`) nor
    has a state from elsewhere leaves them as they are, bit for bit.
    """

    def __init__(self, trained: Trained, backend: str) -> None:
        self.trained, self.zero = trained, backend.startswith("zero")
        self.handles: list[RemovableHandle] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        self.handles = mask_rows(model, self.trained, self.zero)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def mask_rows(model: PreTrainedModel, trained: Trained, zero: bool = False) -> list[RemovableHandle]:
    """Register the mask with a model as it trains: after FSDP 2 has sharded it, or below DDP's or DeepSpeed's wrapping.

    `zero`: DeepSpeed takes a gradient away as soon as it is there, so the mask comes before. Everywhere else it comes after, in place:
    DDP and FSDP 2 call these hooks too (torch, fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce).
    """
    handles = []
    for parameter in rows_of(model, trained.masked):
        old = torch.ones(getattr(parameter, "ds_shape", parameter.shape)[0], dtype=torch.bool)
        old[torch.tensor(trained.new_rows)] = False
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            old = distribute_tensor(old.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).to_local()
        mask = _Mask(old.to(parameter.device))
        handles.append(parameter.register_hook(mask.applied) if zero else parameter.register_post_accumulate_grad_hook(mask))
    return handles


class _Mask:
    """Zeroes rows of a gradient [rows, …]. `old`: bool [rows of this process], what does not train."""

    def __init__(self, old: torch.Tensor) -> None:
        self.old = old

    def __call__(self, parameter: Parameter) -> None:
        """In place, once the gradient has been added up."""
        gradient = parameter.grad
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.masked_fill_(self._beside(local), 0)

    def applied(self, gradient: torch.Tensor) -> torch.Tensor:
        """On a gradient that is still under way."""
        return gradient.masked_fill(self._beside(gradient), 0)

    def _beside(self, gradient: torch.Tensor) -> torch.Tensor:
        self.old = self.old.to(gradient.device)
        return self.old.reshape(-1, *[1] * (gradient.dim() - 1))
