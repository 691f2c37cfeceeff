"""Knows which changes of a recipe or of its launch are worth looking at, and how each is said on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from azrecipe.planning.placement import Where
from azrecipe.planning.training_loops import Loop
from azrecipe.recipe.types import Lora, Pretrain, Sft

PRECISION = {"bf16_mixed": "bf16_pure", "bf16_pure": "bf16_mixed", "float32": "bf16_mixed"}
LORA = Lora(16, 32, 0.05, "all-linear", False, False, [], False)


@dataclass(frozen=True)
class Lever:
    """A change: what it is, how it is said, and the loop and launch that come of it."""

    what: str
    how: str
    loop: Loop
    where: Where


def levers(config: Pretrain | Sft, loop: Loop, where: Where) -> list[Lever]:
    """The changes that this loop can have on these machines, one at a time."""
    found = [Lever(what, how, changed, where) for what, how, changed in (*_kernels(loop), *_arithmetic(loop), *_sizes(config, loop))]
    found += [Lever(what, how, changed, where) for what, how, changed in _adapters(config, loop, where)]
    return [*found, *_backends(loop, where)]


Change = tuple[str, str, Loop]


def _with(loop: Loop, **changes: Any) -> Loop:
    return replace(loop, asked=replace(loop.asked, **changes))


def _kernels(loop: Loop) -> Iterator[Change]:
    now = loop.asked
    if now.kernels or now.head == "liger":
        head = "logits" if now.head == "liger" else now.head
        yield "without Liger's kernels", "--set training.use_liger_kernel=false", _with(loop, kernels=(), head=head)
        return
    head = "liger" if now.head == "logits" else now.head
    yield "Liger's kernels", "--set training.use_liger_kernel=true", _with(loop, kernels=("rms_norm", "swiglu"), head=head)
    if now.head == "logits":
        yield "PyTorch's chunked loss", "--set training.fused_linear_cross_entropy=torch", _with(loop, head="torch")


def _arithmetic(loop: Loop) -> Iterator[Change]:
    now = loop.asked
    on = not now.activation_checkpointing
    what = f"{'with' if on else 'without'} activation checkpointing"
    yield what, f"--set training.activation_checkpointing={str(on).lower()}", _with(loop, activation_checkpointing=on)
    other = PRECISION[now.precision]
    yield f"precision {other}", f"--set training.precision={other}", _with(loop, precision=other)
    if now.masked:
        how = "--set model.attn_implementation=flash_attention_2"
        yield "flash attention, no masks", how, _with(loop, masked=False, attn_implementation="flash_attention_2")


def _sizes(config: Pretrain | Sft, loop: Loop) -> Iterator[Change]:
    half = config.data.max_length // 2
    if half >= 128:
        yield f"sequences of {half:,}", f"--set data.max_length={half}", replace(loop, length=loop.length // 2)
    rows = int(loop.asked.config["vocab_size"])
    if isinstance(config, Pretrain) and rows > 64_000:
        small = {**loop.asked.config, "vocab_size": rows // 2}
        yield f"a vocabulary of {rows // 2:,}", f"--vocab-size {rows // 2}", replace(loop, asked=loop.asked.with_config(small))


def _adapters(config: Pretrain | Sft, loop: Loop, where: Where) -> Iterator[Change]:
    if not isinstance(config, Sft) or config.method != "sft":
        return
    if loop.asked.lora is None:
        yield "LoRA instead of all weights", "--set adapter=lora", _with(loop, lora=LORA)
        return
    yield "all weights instead of an adapter", "--set adapter=none --set lora=null", _with(loop, lora=None, quantized=False)
    if not loop.asked.quantized and where.world == 1:
        yield "the base in 4 bits", "--set adapter=qlora", _with(loop, quantized=True)


def _backends(loop: Loop, where: Where) -> Iterator[Lever]:
    if where.world == 1 or where.context > 1:
        return
    names = {"ddp": "ddp", "fsdp2": "fsdp", "hsdp": "hsdp", "zero2": "zero2", "zero3": "zero3"}
    for kind, name in names.items():
        there = where.as_kind(kind)
        if kind == where.kind or (kind == "hsdp" and (where.world % there.replicate or where.world == there.replicate)):
            continue
        what = f"{name} instead of {names.get(where.kind, where.kind)}"
        how = f"--accelerate-config {name}" + (f" (a copy with dp_replicate_size: {there.replicate})" if there.replicate > 2 else "")
        yield Lever(what, how, _with(loop, kind=kind, shards=there.shards), there)
