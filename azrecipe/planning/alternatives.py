"""Single changes of a recipe or its launch that are worth comparing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from azrecipe.distributed.attention_choice import MIN_CAPABILITY, find_config_obstacles
from azrecipe.hardware import Card
from azrecipe.planning.placement import Placement
from azrecipe.planning.simulation.step_spec import LAYER_KERNELS, StepSpec
from azrecipe.planning.training_loops import PlannedLoop, build_attention_device, find_precision_problem
from azrecipe.recipe.attention_kinds import VARLEN
from azrecipe.recipe.types import Lora, PretrainConfig, SftConfig

ALTERNATIVE_PRECISIONS = {"bf16_mixed": "bf16_pure", "bf16_pure": "bf16_mixed", "float32": "bf16_mixed"}
DEFAULT_LORA = Lora(16, 32, 0.05, "all-linear", False, False, [], False)


@dataclass(frozen=True)
class Alternative:
    """A change, with the loop and the placement that it leads to.

    title: the change in words. options: its command-line options.
    """

    title: str
    options: str
    loop: PlannedLoop
    placement: Placement


def list_alternatives(config: PretrainConfig | SftConfig, loop: PlannedLoop, placement: Placement) -> list[Alternative]:
    """List the single changes that apply to a loop on these machines."""
    changes = [
        *_kernel_changes(loop),
        *_compute_changes(loop, placement.machine.card),
        *_size_changes(config, loop),
        *_adapter_changes(config, loop, placement),
    ]
    same_placement = [Alternative(change.title, change.options, change.loop, placement) for change in changes]
    return [*same_placement, *_list_backend_alternatives(loop, placement)]


class _LoopChange(NamedTuple):
    """A change of a loop that leaves its placement as it is."""

    title: str
    options: str
    loop: PlannedLoop


def _with_step(loop: PlannedLoop, step: StepSpec) -> PlannedLoop:
    return replace(loop, step=step)


def _kernel_changes(loop: PlannedLoop) -> Iterator[_LoopChange]:
    step = loop.step
    if step.kernels or step.head.startswith("liger"):
        head = "logits" if step.head.startswith("liger") else step.head
        changed = _with_step(loop, replace(loop.step, kernels=(), head=head))
        yield _LoopChange("without Liger's kernels", "--set training.use_liger_kernel=false", changed)
        return
    head = "liger_float32" if step.head == "logits" else step.head
    changed = _with_step(loop, replace(loop.step, kernels=LAYER_KERNELS, head=head))
    yield _LoopChange("Liger's kernels", "--set training.use_liger_kernel=true", changed)
    if step.head == "logits":
        changed = _with_step(loop, replace(loop.step, head="torch"))
        yield _LoopChange("PyTorch's chunked loss", "--set training.fused_linear_cross_entropy=torch", changed)


def _compute_changes(loop: PlannedLoop, card: Card) -> Iterator[_LoopChange]:
    step = loop.step
    enable = not step.activation_checkpointing
    title = f"{'with' if enable else 'without'} activation checkpointing"
    options = f"--set training.activation_checkpointing={str(enable).lower()}"
    yield _LoopChange(title, options, _with_step(loop, replace(loop.step, activation_checkpointing=enable, every_n_layers=1)))
    precision = ALTERNATIVE_PRECISIONS[step.precision]
    if not find_precision_problem(precision, card):
        yield _LoopChange(
            f"precision {precision}", f"--set training.precision={precision}", _with_step(loop, replace(loop.step, precision=precision))
        )
    is_new_enough = build_attention_device(card).capability >= MIN_CAPABILITY
    if is_new_enough and step.masked and step.precision != "float32" and not find_config_obstacles(step.config):
        changed = _with_step(loop, replace(loop.step, masked=False, attn_implementation=VARLEN))
        yield _LoopChange("varlen attention, no masks", f"--set model.attn_implementation={VARLEN}", changed)


def _size_changes(config: PretrainConfig | SftConfig, loop: PlannedLoop) -> Iterator[_LoopChange]:
    half = config.data.max_length // 2
    if half >= 128:
        yield _LoopChange(f"sequences of {half:,}", f"--set data.max_length={half}", replace(loop, length=loop.length // 2))
    vocab_size = int(loop.step.config["vocab_size"])
    if isinstance(config, PretrainConfig) and vocab_size > 64_000:
        half = vocab_size // 2
        changed = replace(loop, step=loop.step.with_config({**loop.step.config, "vocab_size": half}))
        yield _LoopChange(f"a vocabulary of {half:,}", f"--vocab-size {half}", changed)


def _adapter_changes(config: PretrainConfig | SftConfig, loop: PlannedLoop, placement: Placement) -> Iterator[_LoopChange]:
    if not isinstance(config, SftConfig) or config.method != "sft":
        return
    if loop.step.lora is None:
        yield _LoopChange("LoRA instead of all weights", "--set adapter=lora", _with_step(loop, replace(loop.step, lora=DEFAULT_LORA)))
        return
    changed = _with_step(loop, replace(loop.step, lora=None, quantized=False))
    yield _LoopChange("all weights instead of an adapter", "--set adapter=none --set lora=null", changed)
    if not loop.step.quantized and placement.world_size == 1:
        yield _LoopChange("the base in 4 bits", "--set adapter=qlora", _with_step(loop, replace(loop.step, quantized=True)))


def _list_backend_alternatives(loop: PlannedLoop, placement: Placement) -> Iterator[Alternative]:
    if placement.world_size == 1 or placement.context_parallel_size > 1:
        return
    names = {"ddp": "ddp", "fsdp2": "fsdp", "hsdp": "hsdp", "zero2": "zero2", "zero3": "zero3"}
    for strategy, name in names.items():
        other = placement.with_strategy(strategy)
        divides = other.world_size % other.replicate_size == 0 and other.world_size > other.replicate_size
        if strategy == placement.strategy or (strategy == "hsdp" and not divides):
            continue
        title = f"{name} instead of {names.get(placement.strategy, placement.strategy)}"
        options = f"--accelerate-config {name}" + (
            f" (a copy with dp_replicate_size: {other.replicate_size})" if other.replicate_size > 2 else ""
        )
        yield Alternative(title, options, _with_step(loop, replace(loop.step, strategy=strategy, shards=other.num_shards)), other)
