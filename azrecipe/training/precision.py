"""Apply `training.precision` on each backend, and check the live weights.

float32: everything. bf16_mixed: float32 weights, gradients summed and optimizer state in float32, bfloat16 arithmetic; what is frozen
and only multiplied is stored in bfloat16 where autocast computes.
bf16_pure: weights, gradients and optimizer state in bfloat16, with no float32 copy anywhere.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.distributed.backend import Backend, has_accelerator
from azrecipe.modeling.dtypes import PARAM_DTYPES

if TYPE_CHECKING:
    from transformers import Trainer


def configure_autocast(precision: str, backend: Backend) -> dict[str, bool]:
    """Return the TrainingArguments that turn PyTorch's autocast on.

    DeepSpeed's autocast stays off, as it would discard the float32 weights. On a sharded CPU backend this sets
    ACCELERATE_MIXED_PRECISION.
    """
    off = {"bf16": False}  # explicit: SFTConfig's default is on
    if precision != "bf16_mixed" or backend.uses_deepspeed:
        return off
    if has_accelerator():
        return {"bf16": True}
    if not backend.sharded:
        return {"bf16": True, "use_cpu": True}
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # bf16=True needs a GPU or use_cpu=True, which drops the sharding
    return off


def rounds_frozen_weights(precision: str, backend: Backend) -> bool:
    """Tell whether frozen matrices are stored in bfloat16.

    So it is under autocast. A sharded backend gathers its float32 shards in bfloat16, a group at a time.
    """
    return precision == "bf16_mixed" and not backend.sharded


def apply_precision(trainer: Trainer, precision: str, backend: Backend) -> None:
    """Set a sharded backend's number formats before it wraps the model.

    The launcher cannot know them.
    """
    state: Any = trainer.accelerator.state
    if backend.uses_deepspeed:
        config = state.deepspeed_plugin.deepspeed_config
        if precision == "bf16_mixed":  # DeepSpeed's own bf16 rounds the weights that it loads and saves
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            config["communication_data_type"] = "fp32"
        elif precision == "bf16_pure":
            config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            config["grad_accum_dtype"] = "bf16"
    elif backend.uses_fsdp and precision == "bf16_mixed":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate would sum gradients in bfloat16, unlike DDP and one process
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def find_precision_problems(trainer: Trainer, precision: str, backend: Backend) -> list[str]:
    """Find live weights whose format differs from `precision`.

    Call it when training begins. The weights of an adapter are not checked.
    """
    expected = PARAM_DTYPES[precision]
    model: Any = trainer.model_wrapped
    if any("lora_" in name for name, _ in model.named_parameters()):
        return []
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    problems = []
    if dtypes != {expected}:
        problems.append(
            f"trained weights are {_format_dtypes(dtypes)} and precision: {precision} keeps them in {_format_dtypes({expected})}"
        )
    if backend.uses_deepspeed:
        optimizer: Any = model.optimizer
        partitions = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3's, of any type; other stages have the optimizer's
        master_dtypes = {p.dtype for p in partitions or [p for group in optimizer.optimizer.param_groups for p in group["params"]]}
        if master_dtypes != {expected}:
            problems.append(f"DeepSpeed's optimizer works on {_format_dtypes(master_dtypes)}, not {_format_dtypes({expected})}")
    policy = model._get_fsdp_state()._mp_policy if backend.uses_fsdp else None
    if policy is not None and policy.reduce_dtype not in (None, expected):
        problems.append(f"FSDP sums gradients in {_format_dtypes({policy.reduce_dtype})}, not {_format_dtypes({expected})}")
    return problems


def _format_dtypes(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
