"""Knows what `training.precision` is made of on each backend, and proves it on the live weights.

float32: everything. bf16_mixed: float32 weights, gradients summed and optimizer state in float32, bfloat16 arithmetic.
bf16_pure: weights, gradients and optimizer state in bfloat16, with no float32 copy anywhere.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.distributed.backend import Backend, has_accelerator
from azrecipe.modeling.dtypes import STORED

if TYPE_CHECKING:
    from transformers import Trainer


def autocast(precision: str, backend: Backend) -> dict[str, bool]:
    """TrainingArguments that turn PyTorch's autocast on. Not DeepSpeed's, which would throw the float32 weights away."""
    off = {"bf16": False}  # said aloud: SFTConfig's own default is on
    if precision != "bf16_mixed" or backend.zero:
        return off
    if has_accelerator():
        return {"bf16": True}
    if not backend.sharded:
        return {"bf16": True, "use_cpu": True}
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # bf16=True is refused without a GPU or use_cpu=True, and that drops the sharding
    return off


def apply(trainer: Trainer, precision: str, backend: Backend) -> None:
    """Tell a sharded backend, before it wraps the model, what the launcher cannot know."""
    state: Any = trainer.accelerator.state
    if backend.zero:
        config = state.deepspeed_plugin.deepspeed_config
        if precision == "bf16_mixed":  # DeepSpeed's own bf16 rounds the weights that a phase starts from, and those that it saves
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            config["communication_data_type"] = "fp32"
        elif precision == "bf16_pure":
            config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            config["grad_accum_dtype"] = "bf16"
    elif backend.fsdp and precision == "bf16_mixed":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate would sum gradients in bfloat16, which DDP and one process do not
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def problems(trainer: Trainer, precision: str, backend: Backend) -> list[str]:
    """What of the live weights is not as `precision` says; to be asked when training begins. An adapter's are its own affair."""
    wanted = STORED[precision]
    model: Any = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    if any("lora_" in name for name, _ in model.named_parameters()):
        return []
    found = {p.dtype for p in model.parameters() if p.requires_grad}
    wrong = (
        [] if found == {wanted} else [f"trained weights are {_names(found)} and precision: {precision} keeps them in {_names({wanted})}"]
    )
    if backend.zero:
        optimizer: Any = model.optimizer
        flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3's, whatever their type; the others' are the optimizer's
        masters = {p.dtype for p in flat or [p for group in optimizer.optimizer.param_groups for p in group["params"]]}
        if masters != {wanted}:
            wrong.append(f"DeepSpeed's optimizer works on {_names(masters)}, not {_names({wanted})}")
    policy = trainer.model_wrapped._get_fsdp_state()._mp_policy if backend.fsdp else None  # FSDP is put around torch.compile's wrapping
    if policy is not None and policy.reduce_dtype not in (None, wanted):
        wrong.append(f"FSDP sums gradients in {_names({policy.reduce_dtype})}, not {_names({wanted})}")
    return wrong


def _names(types: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(t).removeprefix("torch.") for t in types))
