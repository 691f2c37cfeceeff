"""Limit a matrix' gradient to some of its rows, sharded or not.

The other rows never change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from azrecipe.modeling.parameter_groups import TrainableParameters, list_token_parameters

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


class RowGradientMask(TrainerCallback):  # type: ignore[misc]
    """Masks gradients of the matrices that train in new rows only.

    It applies while one Trainer trains. The gradient of every other row is 0 before it is clipped. So an optimizer that neither decays
    these weights (`parameter_groups.list_weight_decay_parameters`) nor has a state from elsewhere leaves them unchanged, bit for bit.
    """

    def __init__(self, trainable: TrainableParameters, strategy: str) -> None:
        self.trainable, self.with_deepspeed = trainable, strategy.startswith("zero")
        self.handles: list[RemovableHandle] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        self.handles = register_row_masks(model, self.trainable, self.with_deepspeed)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def register_row_masks(model: PreTrainedModel, trainable: TrainableParameters, with_deepspeed: bool = False) -> list[RemovableHandle]:
    """Register gradient masks on a model that trains.

    Call it after FSDP 2 has sharded the model, on the module below DDP's or DeepSpeed's wrapper.

    Args:
        model: The model.
        trainable: Which matrices and rows train.
        with_deepspeed: DeepSpeed takes a gradient away as soon as it exists, so the mask is applied before. On other backends it is
            applied after, in place. DDP and FSDP 2 call these hooks too (torch, fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce).

    Returns:
        The handles that remove the masks.
    """
    handles = []
    for parameter in list_token_parameters(model, trainable.masked_matrices):
        frozen = torch.ones(getattr(parameter, "ds_shape", parameter.shape)[0], dtype=torch.bool)
        frozen[torch.tensor(trainable.new_rows)] = False
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            frozen = distribute_tensor(frozen.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).to_local()
        mask = _Mask(frozen.to(parameter.device))
        handles.append(
            parameter.register_hook(mask.mask_gradient) if with_deepspeed else parameter.register_post_accumulate_grad_hook(mask)
        )
    return handles


class _Mask:
    """Zeroes rows of a gradient [rows, …].

    `frozen`: bool [rows of this process], the rows that do not train.
    """

    def __init__(self, frozen: torch.Tensor) -> None:
        self.frozen = frozen

    def __call__(self, parameter: Parameter) -> None:
        """Mask the parameter's accumulated gradient in place."""
        gradient = parameter.grad
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.masked_fill_(self._match_shape(local), 0)

    def mask_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Mask a gradient before it is accumulated."""
        return gradient.masked_fill(self._match_shape(gradient), 0)

    def _match_shape(self, gradient: torch.Tensor) -> torch.Tensor:
        """Shape the mask so that it broadcasts over a gradient [rows, …]."""
        self.frozen = self.frozen.to(gradient.device)
        return self.frozen.reshape(-1, *[1] * (gradient.dim() - 1))
