"""The training loops of a recipe on a backend. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from azrecipe.distributed import batch_size
from azrecipe.distributed.attention_choice import (
    MIN_CAPABILITY,
    AttentionDevice,
    AttentionUse,
    choose_attention,
    find_config_obstacles,
)
from azrecipe.distributed.backend import Backend
from azrecipe.hardware import Card
from azrecipe.modeling import liger_kernels
from azrecipe.planning.model_config import ModelShape
from azrecipe.planning.simulation.step_spec import LAYER_KERNELS, StepSpec
from azrecipe.recipe import optimizer_settings
from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import PretrainConfig, SftConfig, Training


@dataclass(frozen=True)
class PlannedLoop:
    """One training loop of a recipe.

    length: tokens of a sequence on a device. batch: sequences on a device at once. accumulation: batches in an optimizer step. pairs:
    sequences of one row of data (2 for preferences). eval_batch: sequences on a device while measuring; 0 where that is not planned.
    """

    name: str
    step: StepSpec
    length: int
    batch: int
    accumulation: int
    global_batch_size: int
    pairs: int = 1
    eval_batch: int = 0

    def count_tokens(self, backend: Backend) -> int:
        """Count the tokens in an optimizer step of all processes."""
        return self.global_batch_size * self.pairs * self.length * backend.context_parallel_size


def plan_loops(
    recipe: Recipe, model: ModelShape, backend: Backend, cuda: bool = True, reshard: bool = True, *, card: Card | None = None
) -> list[PlannedLoop]:
    """Plan the loops of a pretrain or sft recipe.

    Args:
        recipe: The recipe.
        model: The shapes of its model.
        backend: The processes.
        cuda: Whether they run on GPUs.
        reshard: accelerate's fsdp_reshard_after_forward.
        card: The GPU; None where it is not known, and taken to be new enough for every attention.

    Raises:
        CommandError: The global batch does not divide over the processes.
    """
    return plan_config_loops(recipe.config, model, backend, cuda, reshard, card=card)


def build_attention_device(card: Card | None) -> AttentionDevice:
    """Describe a card as far as attention depends on it.

    PyTorch gives AMD's architectures as it gives CUDA's: gfx942 is (9, 4), gfx90a is (9, 0).
    """
    if card is None or card.capability is None:
        return AttentionDevice("the card", MIN_CAPABILITY)
    if card.capability.startswith("gfx"):
        return AttentionDevice(card.name, (int(card.capability[3:-2]), int(card.capability[-2], 16)))
    major, minor = card.capability.split(".")
    return AttentionDevice(card.name, (int(major), int(minor)))


def find_precision_problem(precision: str, card: Card) -> str:
    """Say why a run on a card refuses a precision, or "".

    A run asks PyTorch (distributed/requirements.py, check_precision).
    """
    if precision == "float32" or card.bf16:
        return ""
    return f"a {card.name} has no units for bfloat16, and a run on it refuses precision: {precision}: --set training.precision=float32"


def resolve_attention(config: PretrainConfig | SftConfig, model: ModelShape, backend: Backend, cuda: bool, card: Card | None = None) -> str:
    """Resolve `auto` as a run on these cards will; see choose_attention.

    A run asks the model itself. Here its configuration decides, and PyTorch is taken to be new enough.

    Args:
        config: The recipe's config.
        model: The shapes of its model.
        backend: The processes.
        cuda: Whether they run on GPUs.
        card: The GPU, where it is known.
    """
    name = config.model.attn_implementation
    if name != AUTO:
        return name
    use = AttentionUse(
        config.stage,
        config.training.precision,
        config.data.packing,
        backend.context_parallel_size,
        find_config_obstacles(model.config),
    )
    device = build_attention_device(card) if cuda else AttentionDevice()
    return choose_attention(name, use, device).name


def plan_config_loops(
    config: PretrainConfig | SftConfig,
    model: ModelShape,
    backend: Backend,
    cuda: bool = True,
    reshard: bool = True,
    *,
    card: Card | None = None,
) -> list[PlannedLoop]:
    """Plan the loops of a recipe's config; see plan_loops.

    Args:
        config: The recipe's config.
        model: The shapes of its model.
        backend: The processes.
        cuda: Whether they run on GPUs.
        reshard: accelerate's fsdp_reshard_after_forward.
        card: The GPU, where it is known.
    """
    training = config.training
    split = batch_size.split_batch(training.global_batch_size, training.per_device_train_batch_size, backend.data_parallel_size)
    attention = resolve_attention(config, model, backend, cuda, card)
    step = StepSpec(
        config=dict(model.config),
        precision=training.precision,
        attn_implementation=attention,
        masked=config.data.packing and attention == "sdpa" and backend.context_parallel_size == 1,
        kernels=_list_kernels(training),
        activation_checkpointing=training.checkpoint_every > 0,
        every_n_layers=max(training.checkpoint_every, 1),
        accumulates=split.accumulation > 1,
        sync_each_batch=training.sync_each_batch,
        torch_compile=training.torch_compile,
        strategy=backend.strategy,
        shards=backend.num_shards,
        reshard_after_forward=reshard,
        cuda=cuda,
    )
    length = config.data.max_length // backend.context_parallel_size
    if isinstance(config, PretrainConfig):
        return [
            PlannedLoop(
                phase.name,
                replace(
                    step,
                    head=_choose_head(config.training),
                    trainable=tuple(phase.trainable_parameters),
                    new_rows=model.new_tokens,
                    **_get_optimizer_arguments(optimizer_settings.merge_phase_settings(config.training, phase)),
                ),
                length,
                split.per_device,
                split.accumulation,
                training.global_batch_size,
                eval_batch=training.per_device_eval_batch_size,
            )
            for phase in config.phases
        ]
    has_adapter = config.adapter != "none"
    step = replace(
        step,
        head="trl",
        lora=config.lora if has_adapter else None,
        quantized=config.adapter == "qlora",
        adapter_dtype="bfloat16" if _casts_adapter(config, backend) else None,
        reference=config.method == "dpo" and not has_adapter,
        **_get_optimizer_arguments(config.training),
    )
    pairs = 2 if config.method == "dpo" else 1
    return [PlannedLoop(config.method, step, length, split.per_device * pairs, split.accumulation, training.global_batch_size, pairs)]


def _casts_adapter(config: SftConfig, backend: Backend) -> bool:
    """Return whether TRL keeps an adapter in bfloat16.

    Beside 4 bits it does, and under ZeRO 3 an adapter is as its base is.
    """
    follows_base = backend.strategy == "zero3" and config.training.precision == "bf16_pure" and config.adapter == "lora"
    return config.adapter == "qlora" or follows_base


def _get_optimizer_arguments(training: Training) -> dict[str, Any]:
    return {"optim": training.optim, "max_grad_norm": training.max_grad_norm}


def _list_kernels(training: Training) -> tuple[str, ...]:
    """List the Liger kernels that are on.

    A model may lack the layers for some of them.
    """
    if not training.use_liger_kernel:
        return ()
    chosen: Mapping[str, bool] = liger_kernels.choose_kernels(training) or {}
    return tuple(name for name in LAYER_KERNELS if chosen.get(name, True))


def _choose_head(training: Any) -> str:
    if training.fused_linear_cross_entropy == "torch":
        return "torch"
    chosen = liger_kernels.choose_kernels(training) or {}
    return "liger_float32" if training.use_liger_kernel and chosen.get("fused_linear_cross_entropy", True) else "logits"
