"""A training step's description: all that decides its cost. No torch."""

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

SOURCE_MODULES = (
    "azrecipe.planning.simulation.step_simulation",
    "azrecipe.planning.simulation.meta_model",
    "azrecipe.planning.simulation.memory_tracker",
    "azrecipe.planning.simulation.fused_traffic",
    "azrecipe.planning.simulation.gradient_accumulation",
    "azrecipe.planning.simulation.kernel_stubs",
    "azrecipe.planning.simulation.bitsandbytes_stubs",
    "azrecipe.planning.simulation.step_cost",
    "azrecipe.planning.simulation.recorded_step",
    "azrecipe.planning.simulation.loss_tiles",
    "azrecipe.modeling.frozen_weights",
    "azrecipe.modeling.parameter_groups",
    "azrecipe.modeling.lora",
)  # the modules that compute a cost

LAYER_KERNELS = ("rms_norm", "swiglu", "geglu", "layer_norm")  # Liger's kernels in layers; a model has the layers for some of them


@dataclass(frozen=True)
class BatchShape:
    """Sequences on a device at once, and the tokens of each."""

    batch: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """A training step, without its batch.

    Attributes:
        config: transformers' configuration, with model_type and the trained vocab_size.
        trainable: Parameter groups and patterns that train; without an adapter.
        new_rows: Rows of the embeddings that the base model lacks.
        quantized: Whether the base model's weights are in 4 bits.
        adapter_dtype: What an adapter's numbers are in; None: float32, as PEFT makes them.
        weights_dtype: What a model is loaded in; None: as the precision says. Trained with autocast all the same, an adapter beside bfloat16.
        reference: Whether a second copy of the weights is there (DPO).
        masked: Whether a mask [length, length] separates packed documents.
        kernels: Liger's kernels that are on.
        head: How the loss is computed: logits (all at once), or liger, torch, trl (a tile at a time).
        every_n_layers: With checkpointing, every so many layers recompute their activations.
        accumulates: Whether an optimizer step has several batches.
        sync_each_batch: The recipe's key: whether each batch's gradients are summed over the processes.
        torch_compile: Whether the decoder layers are compiled.
        shards: Processes that the model is split over; 1: it is not.
        cuda: Whether the step runs on a GPU.
    """

    config: Mapping[str, Any]
    precision: str
    trainable: tuple[str, ...] = ("all",)
    new_rows: int = 0
    lora: Lora | None = None
    quantized: bool = False
    adapter_dtype: str | None = None
    weights_dtype: str | None = None
    reference: bool = False
    attn_implementation: str = "sdpa"
    masked: bool = False
    kernels: tuple[str, ...] = ()
    head: str = "logits"
    optim: str = "adamw_torch_fused"
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    every_n_layers: int = 1
    accumulates: bool = False
    sync_each_batch: bool | str = "auto"
    torch_compile: bool = False
    strategy: str = "single"
    shards: int = 1
    reshard_after_forward: bool = True
    cuda: bool = True

    @property
    def uses_fsdp(self) -> bool:
        """Whether the step is simulated under FSDP 2; ZeRO 3 is too."""
        return self.shards > 1

    @property
    def uses_deepspeed(self) -> bool:
        return self.strategy.startswith("zero")

    @property
    def rounds_frozen_weights(self) -> bool:
        """Whether frozen matrices are stored in bfloat16 (training.precision)."""
        return self.precision == "bf16_mixed" and self.strategy in ("single", "ddp")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients of earlier batches are there while a batch runs.

        DeepSpeed's are not: it partitions them after every batch.
        """
        return self.accumulates and not self.uses_deepspeed

    def with_config(self, config: Mapping[str, Any]) -> StepSpec:
        return replace(self, config=dict(config))

    def to_simulated(self, shards: int) -> StepSpec:
        """Return the step that is simulated for this one.

        Sharded strategies are simulated as FSDP 2 over `shards` processes, all others as one process. One batch is simulated: its cost
        holds for a first batch and for later ones, whenever gradients are summed. It holds for compiled layers too.
        """
        strategy = "fsdp2" if self.uses_fsdp else "single" if self.strategy in ("single", "ddp") else self.strategy
        split = shards if self.uses_fsdp else 1
        return replace(self, strategy=strategy, shards=split, accumulates=False, sync_each_batch="auto", torch_compile=False)

    def get_cache_key(self, length: int) -> str:
        """Hash the step, its length, the code and the libraries."""
        text = json.dumps([_hash_sources(), asdict(self), length, _list_versions()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _list_versions() -> list[str]:
    return [version(name) for name in ("torch", "transformers", "peft", "accelerate")]


@cache
def _hash_sources() -> str:
    """Hash the modules that compute a cost, to notice a change."""
    return hashlib.sha256(b"".join(_read_source(module) for module in SOURCE_MODULES)).hexdigest()


def _read_source(module: str) -> bytes:
    """Read a module's source without importing it: most load torch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no {module}")
    return Path(spec.origin).read_bytes()
