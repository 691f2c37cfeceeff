"""Knows which training steps a recipe asks for, phase by phase, on so many processes of a backend. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from azrecipe.distributed import batch_size
from azrecipe.distributed.backend import Backend
from azrecipe.modeling import liger_kernels
from azrecipe.planning.model_config import ModelShape
from azrecipe.planning.simulation.step_spec import Asked
from azrecipe.recipe import optimizer_settings
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Pretrain, Sft, Training


@dataclass(frozen=True)
class Loop:
    """One training loop of a recipe: what a step is, sequences of how many tokens, how many on a device and how often they accumulate.

    pairs: sequences that one row of data stands for (2 for preferences).
    """

    name: str
    asked: Asked
    length: int
    batch: int
    accumulation: int
    global_batch_size: int
    pairs: int = 1

    def tokens(self, backend: Backend) -> int:
        """In a step of all processes."""
        return self.global_batch_size * self.pairs * self.length * backend.context


def loops(recipe: Recipe, model: ModelShape, backend: Backend, cuda: bool = True, reshard: bool = True) -> list[Loop]:
    """The loops of a pretrain or sft recipe. Raises CommandError where the global batch does not divide over the processes.

    `reshard`: as fsdp_reshard_after_forward says.
    """
    return loops_of(recipe.config, model, backend, cuda, reshard)


def loops_of(config: Pretrain | Sft, model: ModelShape, backend: Backend, cuda: bool = True, reshard: bool = True) -> list[Loop]:
    """The same, of what a recipe says."""
    training = config.training
    split = batch_size.split(training.global_batch_size, training.per_device_train_batch_size, backend.readers)
    asked = Asked(
        config=dict(model.config),
        precision=training.precision,
        attn_implementation=config.model.attn_implementation,
        masked=config.data.packing and config.model.attn_implementation == "sdpa" and backend.context == 1,
        kernels=_kernels(training),
        activation_checkpointing=training.activation_checkpointing,
        accumulates=split.accumulation > 1,
        kind=backend.kind,
        shards=backend.shards,
        reshard_after_forward=reshard,
        cuda=cuda,
    )
    length = config.data.max_length // backend.context
    if isinstance(config, Pretrain):
        return [
            Loop(
                phase.name,
                replace(
                    asked,
                    head=_head(config.training),
                    trainable=tuple(phase.trainable_parameters),
                    new_rows=model.new_tokens,
                    **_optimizer(optimizer_settings.of_phase(config.training, phase)),
                ),
                length,
                split.per_device,
                split.accumulation,
                training.global_batch_size,
            )
            for phase in config.phases
        ]
    adapted = config.adapter != "none"
    asked = replace(
        asked,
        head="trl",
        lora=config.lora if adapted else None,
        quantized=config.adapter == "qlora",
        reference=config.method == "dpo" and not adapted,
        **_optimizer(config.training),
    )
    pairs = 2 if config.method == "dpo" else 1
    return [Loop(config.method, asked, length, split.per_device * pairs, split.accumulation, training.global_batch_size, pairs)]


def _optimizer(training: Training) -> dict[str, Any]:
    return {"optim": training.optim, "max_grad_norm": training.max_grad_norm}


def _kernels(training: Training) -> tuple[str, ...]:
    """Liger's kernels that may be in use; those that a model has no place for find none."""
    if not training.use_liger_kernel:
        return ()
    named: Mapping[str, bool] = liger_kernels.choice(training) or {}
    return tuple(name for name in ("rms_norm", "swiglu", "geglu", "layer_norm") if named.get(name, True))


def _head(training: Any) -> str:
    if training.fused_linear_cross_entropy == "torch":
        return "torch"
    named = liger_kernels.choice(training) or {}
    return "liger" if training.use_liger_kernel and named.get("fused_linear_cross_entropy", True) else "logits"
