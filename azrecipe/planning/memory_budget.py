"""How much card memory a training step needs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from azrecipe.distributed import batch_size, gradient_sync
from azrecipe.distributed.backend import Backend
from azrecipe.hardware import GIB
from azrecipe.planning.simulation.step_cost import OPTIMIZER_KINDS, StepCost
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.planning.training_loops import PlannedLoop

CUDA_CONTEXT_BYTES = (
    0.6 * GIB
)  # CUDA's context and library workspaces: 0.5 to 1 GiB by card and driver. PyTorch does not allocate it, so no step shows it
NCCL_BUFFER_BYTES = 0.5 * GIB  # with several processes; grows with channels and peers
FRAGMENTATION_SHARE = 0.06  # of the peak: memory that the allocator holds and cannot use
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default of reduce_bucket_size and of allgather_bucket_size
MAX_BATCH = 1024  # sequences on a device
VERDICTS = ("fits", "may fit", "does not fit")  # best first

KINDS_BY_PART = {
    "weights": ("weights",),
    "gradients": ("gradients", "accumulated"),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "logits and loss": ("logits", "tile"),
    "temporary": ("temporary", "optimizer_temporary"),
    "communication": ("unsharded", "communication"),
    "buffers": ("buffers",),
}


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes on one card at the peak of a step.

    parts: bytes by purpose. peak: their sum. lower_bound: with the CUDA context. upper_bound: also with fragmentation and NCCL's buffers.
    """

    parts: Mapping[str, float]
    peak: float
    lower_bound: float
    upper_bound: float

    def get_verdict(self, card_bytes: float) -> str:
        """Return `fits`, `may fit` or `does not fit`."""
        return VERDICTS[0 if self.upper_bound <= card_bytes else 1 if self.lower_bound <= card_bytes else 2]


class LargestBatch(NamedTuple):
    """The largest batch that certainly fits, and the largest that may fit."""

    certain: int
    possible: int


def compute_memory_budget(cost: StepCost, step: StepSpec, batch: int, world_size: int, replicate: int = 1) -> MemoryBudget:
    """Compute the memory of a step on one card_bytes.

    ZeRO 1 and 2 are computed from formulas, without a simulated step, and are not verified.

    Args:
        cost: The simulated step.
        step: What the step does; decides how the strategy splits get_peak_memory.
        batch: Sequences on each process.
        world_size: Processes.
        replicate: Copies of the model, for HSDP.
    """
    shards = world_size // replicate if step.uses_fsdp else None
    trainable_bytes = float(cost.parameters.trainable_bytes)
    synced = gradient_sync.syncs_each_batch(step.sync_each_batch, shards or 1, trainable_bytes)
    if step.strategy == "ddp":  # gradients lie in the reducer's buckets, which are there all the time
        by_kind = cost.get_peak_memory(batch, accumulates=True, sync_each_batch=True)
    else:
        synced = synced and step.uses_fsdp
        shares = _get_zero_shares(step.strategy, world_size)
        by_kind = cost.get_peak_memory(batch, shards, step.keeps_gradients, sync_each_batch=synced, shares=shares)
    if step.strategy.startswith("zero"):
        by_kind["communication"] += _compute_zero_buckets(step.strategy, cost)
    parts = {name: sum(by_kind[kind] for kind in kinds) for name, kinds in KINDS_BY_PART.items()}
    return build_memory_budget(parts, world_size)


def _compute_zero_buckets(strategy: str, cost: StepCost) -> float:
    """Compute the bytes of DeepSpeed's buckets.

    It allocates the bucket for reducing gradients whole, however small the model is (recorded on CPU with DeepSpeed 0.19.8 and two
    processes). ZeRO 1 and 2 gather updated weights in a second one, of which a small model fills a part.
    """
    width = cost.parameters.trainable_bytes / max(cost.parameters.trainable, 1)
    bucket = DEEPSPEED_BUCKET_ELEMENTS * width
    return bucket if strategy == "zero3" else max(bucket, min(2 * bucket, 2.0 * cost.parameters.trainable_bytes))


def _get_zero_shares(strategy: str, world_size: int) -> dict[str, float]:
    """Return what part of each kind a process has under ZeRO."""
    kinds = {"zero1": OPTIMIZER_KINDS, "zero2": ("gradients", *OPTIMIZER_KINDS)}.get(strategy, ())
    return dict.fromkeys(kinds, 1 / world_size)


def build_memory_budget(parts: Mapping[str, float], world_size: int) -> MemoryBudget:
    """Build a budget from the bytes of tensors by purpose."""
    peak = sum(parts.values())
    collectives = NCCL_BUFFER_BYTES if world_size > 1 else 0.0
    return MemoryBudget(parts, peak, peak + CUDA_CONTEXT_BYTES, peak * (1 + FRAGMENTATION_SHARE) + CUDA_CONTEXT_BYTES + collectives)


def find_largest_batches(cost: StepCost, step: StepSpec, card_bytes: float, world_size: int, replicate: int = 1) -> LargestBatch:
    """Find the largest batches that fit on a card.

    Args:
        cost: The simulated step.
        step: What the step does.
        card_bytes: Memory of one card_bytes.
        world_size: Processes.
        replicate: Copies of the model, for HSDP.
    """
    return LargestBatch(
        certain=_find_largest(lambda batch: compute_memory_budget(cost, step, batch, world_size, replicate).upper_bound <= card_bytes),
        possible=_find_largest(lambda batch: compute_memory_budget(cost, step, batch, world_size, replicate).lower_bound <= card_bytes),
    )


def find_largest_fitting_batch(cost: StepCost, loop: PlannedLoop, card_bytes: float, backend: Backend) -> batch_size.BatchSplit | None:
    """Split a loop's global batch into the largest fitting batch.

    Fitting means: certainly. Accumulation needs memory of its own, so each split is computed as it would run.

    Args:
        cost: The simulated step.
        loop: The loop, with its global batch.
        card_bytes: Memory of one card.
        backend: The processes.

    Returns:
        The split, or None where not even one sequence fits.
    """
    ceiling = find_largest_batches(cost, loop.step, card_bytes, backend.world_size, backend.replicate_size).certain // loop.pairs
    while ceiling > 0:
        split = batch_size.split_batch(loop.global_batch_size, ceiling, backend.data_parallel_size)
        step = replace(loop.step, accumulates=split.accumulation > 1)
        if (
            compute_memory_budget(cost, step, split.per_device * loop.pairs, backend.world_size, backend.replicate_size).upper_bound
            <= card_bytes
        ):
            return split
        ceiling = split.per_device - 1
    return None


def _find_largest(fits: Callable[[int], bool]) -> int:
    """Find the largest batch that fits, by bisection."""
    low, high = 0, 1
    while high <= MAX_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
