"""Knows what decides how much memory and arithmetic a training step takes: of the recipe, of the launch, of the machine. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from azrecipe.recipe.types import Lora

SOURCES = (
    "azrecipe.planning.simulation.step_simulation",
    "azrecipe.planning.simulation.memory_tracker",
    "azrecipe.planning.simulation.gradient_accumulation",
    "azrecipe.planning.simulation.kernel_stubs",
    "azrecipe.planning.simulation.step_cost",
    "azrecipe.planning.simulation.loss_tiles",
    "azrecipe.modeling.parameter_groups",
    "azrecipe.modeling.lora",
)  # the modules that an answer comes from


@dataclass(frozen=True)
class Shape:
    """Sequences on a device at once, and tokens in each."""

    batch: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A training step but for its batch.

    config: transformers' own, with model_type and the vocab_size trained with. trainable: groups and patterns, without an adapter.
    kernels: Liger's that are in use. head: how the loss is computed: logits (all of them), liger, torch or trl (a tile at a time).
    reference: a second copy of the weights is held, to compare with. masked: packed documents are kept apart by a mask [length, length]. shards: processes that the model is split over (1: whole).
    """

    config: Mapping[str, Any]
    precision: str
    trainable: tuple[str, ...] = ("all",)
    new_rows: int = 0
    lora: Lora | None = None
    quantized: bool = False
    reference: bool = False
    attn_implementation: str = "sdpa"
    masked: bool = False
    kernels: tuple[str, ...] = ()
    head: str = "logits"
    optim: str = "adamw_torch_fused"
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    accumulates: bool = False
    kind: str = "single"
    shards: int = 1
    reshard_after_forward: bool = True
    cuda: bool = True

    @property
    def fsdp(self) -> bool:
        """Whether the step is run under FSDP 2; ZeRO 3 is planned as it."""
        return self.shards > 1

    @property
    def zero(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def adds_up(self) -> bool:
        """Whether a batch finds gradients that earlier ones left as they were computed; DeepSpeed divides them after every batch."""
        return self.accumulates and not self.zero

    def with_config(self, config: Mapping[str, Any]) -> Asked:
        return replace(self, config=dict(config))

    def run_as(self, shards: int) -> Asked:
        """The step that stands for this one: every backend that splits the model is run as FSDP 2 over `shards`, every other as one process.

        One batch is run, whether others come before it or not: its cost tells of both.
        """
        kind, split = ("fsdp2", shards) if self.fsdp else ("single", 1)
        return replace(self, kind=kind, shards=split, accumulates=False)

    def key(self, length: int) -> str:
        """Names what a step of this length takes, on disk: the same question, and the same libraries that answer it."""
        text = json.dumps([_own(), asdict(self), length, _libraries()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _libraries() -> list[str]:
    return [version(name) for name in ("torch", "transformers", "peft", "accelerate")]


@cache
def _own() -> str:
    """A hash of the modules that an answer comes from: another one is asked for again."""
    return hashlib.sha256(b"".join(_read_source(module) for module in SOURCES)).hexdigest()


def _read_source(module: str) -> bytes:
    """The source of a module, which is not imported for it: most of them load torch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no {module}")
    return Path(spec.origin).read_bytes()
