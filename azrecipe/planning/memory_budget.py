"""Knows how much of a card a training step needs: what it holds at its peak, and what the card must have besides. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from azrecipe.distributed import batch_size
from azrecipe.distributed.backend import Backend
from azrecipe.hardware import GIB
from azrecipe.planning.simulation.step_cost import Cost
from azrecipe.planning.simulation.step_spec import Asked
from azrecipe.planning.training_loops import Loop

CONTEXT = 0.6 * GIB  # CUDA's context and the libraries' workspaces: 0.5 to 1 GiB, by card and driver; not PyTorch's, so not measured
COLLECTIVES = 0.5 * GIB  # NCCL's buffers, where there are several processes; grows with channels and peers
FRAGMENTS = 0.06  # of the peak, that an allocator may hold in pieces of no use
DEEPSPEED_BUCKET = 500_000_000  # elements of reduce_bucket_size and of allgather_bucket_size, DeepSpeed's defaults
MOST = 1024  # sequences on a device that are looked at

PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients", "accumulated"),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "logits and loss": ("logits", "tile"),
    "temporary": ("temporary",),
    "communication": ("unsharded", "communication"),
    "buffers": ("buffers",),
}


@dataclass(frozen=True)
class Room:
    """Bytes on one card at the peak of a step. parts: by what they are for. least, most: with and without room for what cannot be known."""

    parts: Mapping[str, float]
    peak: float
    least: float
    most: float

    def verdict(self, card: float) -> str:
        """fits, may fit or does not fit, on a card with so many bytes."""
        return "fits" if self.most <= card else "may fit" if self.least <= card else "does not fit"


def room(cost: Cost, asked: Asked, batch: int, world: int, replicate: int = 1) -> Room:
    """What a step of `batch` sequences on each of `world` processes needs. DeepSpeed's ZeRO is reckoned, not run: not verified."""
    shards = world // replicate if asked.fsdp else None
    held = cost.memory(batch, shards, asked.adds_up)
    trained = float(cost.parameters.trainable_bytes)
    if asked.kind == "ddp":
        held["communication"] += trained  # the reducer's buckets, beside the gradients
    elif asked.kind in ("zero1", "zero2"):
        held["optimizer"] /= world
        width = trained / max(cost.parameters.trainable, 1)
        held["communication"] += min(2 * DEEPSPEED_BUCKET * width, 2 * trained)
        if asked.kind == "zero2":
            held["gradients"] /= world
    parts = {name: sum(held[kind] for kind in kinds) for name, kinds in PARTS.items()}
    peak = sum(parts.values())
    several = COLLECTIVES if world > 1 else 0.0
    return Room(parts, peak, peak + CONTEXT, peak * (1 + FRAGMENTS) + CONTEXT + several)


def largest_batch(cost: Cost, asked: Asked, card: float, world: int, replicate: int = 1) -> tuple[int, int]:
    """The most sequences that surely fit on a card of so many bytes, and the most that may."""
    return (
        _most(lambda batch: room(cost, asked, batch, world, replicate).most <= card),
        _most(lambda batch: room(cost, asked, batch, world, replicate).least <= card),
    )


def fitting(cost: Cost, loop: Loop, card: float, backend: Backend) -> batch_size.Split | None:
    """The split of a loop's global batch with the most sequences on a card that surely fit there; None where not even one does.

    A batch that has to accumulate needs more than one that has not.
    """
    surely, _ = largest_batch(cost, loop.asked, card, backend.world, backend.replicate)
    most = surely // loop.pairs
    while most > 0:
        split = batch_size.split(loop.global_batch_size, most, backend.readers)
        asked = replace(loop.asked, accumulates=split.accumulation > 1)
        if room(cost, asked, split.per_device * loop.pairs, backend.world, backend.replicate).most <= card:
            return split
        most = split.per_device - 1
    return None


def _most(fits: Callable[[int], bool]) -> int:
    """The last batch that fits, what is larger needing more."""
    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
