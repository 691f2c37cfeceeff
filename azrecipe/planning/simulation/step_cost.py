"""The cost of a step at any batch, from one recorded step.

No torch. Live bytes after an operator are linear in the batch and in the number of equal decoder layers. Which operator has the most bytes
is not linear. So the line of every operator that is the highest at some batch is kept, and the peak at a batch is the highest line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from azrecipe.planning.simulation.loss_tiles import count_loss_tokens, count_tile_rows

# "accumulated" is the last kind, and the sharded kinds are the first ones: the slices below rely on it
MEMORY_KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "optimizer_temporary",
    "activations",
    "logits",
    "unsharded",
    "communication",
    "buffers",
    "temporary",
    "accumulated",
)
SHARDED_KINDS = MEMORY_KINDS[:4]  # a process has a part of them, where the model is split
OPTIMIZER_KINDS = ("optimizer", "optimizer_temporary")  # of which a process has a part under ZeRO 1 too


class BatchLinear(NamedTuple):
    """An amount linear in the batch: base + each * batch."""

    base: float
    each: float

    def at_batch(self, batch: int) -> float:
        """Return the amount at a batch."""
        return self.base + self.each * batch

    def scale(self, factor: float) -> BatchLinear:
        """Multiply both parts by a factor."""
        return BatchLinear(self.base * factor, self.each * factor)


NO_BYTES = BatchLinear(0.0, 0.0)


class OperatorWork(NamedTuple):
    """The work of an operator.

    moved: bytes that it reads and writes by itself. fused: those in a compiled decoder layer. is_float32: whether it multiplies float32.
    """

    flops: BatchLinear
    moved: BatchLinear
    fused: BatchLinear
    is_float32: bool

    def scale(self, factor: float) -> OperatorWork:
        """Multiply the amounts by a factor."""
        return OperatorWork(self.flops.scale(factor), self.moved.scale(factor), self.fused.scale(factor), self.is_float32)


NO_WORK = OperatorWork(NO_BYTES, NO_BYTES, NO_BYTES, False)


class HeadShape(NamedTuple):
    """The kind of the loss, and the head's rows and width."""

    kind: str
    vocab_size: int
    width: int

    def count_tile_rows(self, batch: int, length: int) -> int:
        """Count the rows of a logit tile; 0 without tiles."""
        if self.kind == "logits":
            return 0
        return count_tile_rows(self.kind, count_loss_tokens(self.kind, batch, length), self.vocab_size, self.width)


@dataclass(frozen=True)
class ParameterCounts:
    """A model's parameters: numbers of them, and bytes on a process."""

    total: int
    trainable: int
    embeddings: int
    bytes: int
    trainable_bytes: int


@dataclass(frozen=True)
class MemoryLine:
    """Live bytes after one operator.

    By kind they are base + each * batch. tile: bytes of logit tiles for each row of a tile.
    """

    base: tuple[float, ...]
    each: tuple[float, ...]
    tile: float


@dataclass(frozen=True)
class OperatorGroup:
    """Operators of one size: their number, and the work of each.

    once: these are the optimizer's operators. They run once a step on this process' part, whatever the gradient accumulation.
    """

    once: bool
    count: float
    work: OperatorWork


class CardPeaks(NamedTuple):
    """A card's peaks: FLOPs and bytes a second."""

    flops: float
    float32_flops: float
    bytes: float

    def compute_seconds(self, work: OperatorWork, batch: int, is_compiled: bool) -> float:
        """Compute an operator's seconds: of its arithmetic, or its longer traffic."""
        moved = work.fused if is_compiled else work.moved
        peak = self.float32_flops if work.is_float32 else self.flops
        return max(work.flops.at_batch(batch) / peak, moved.at_batch(batch) / self.bytes)


@dataclass(frozen=True)
class StepCost:
    """The cost of a step, on each of its processes.

    length: tokens of a sequence. shards: processes that the model is split over. gradient_bytes: a process' part of all gradients.
    adding: bytes that move where a batch's gradients are added to those of earlier batches.
    """

    length: int
    shards: int
    parameters: ParameterCounts
    head: HeadShape
    lines: tuple[MemoryLine, ...]
    work: tuple[OperatorGroup, ...]
    gradient_bytes: float
    adding: float

    def get_peak_memory(
        self,
        batch: int,
        shards: int | None = None,
        accumulates: bool = False,
        *,
        sync_each_batch: bool = False,
        shares: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return the bytes by kind at the peak.

        The kinds are MEMORY_KINDS and `tile`.

        Args:
            batch: Sequences on the device.
            shards: Another number of processes than the simulated one.
            accumulates: Whether gradients of earlier batches are there.
            sync_each_batch: Whether these are summed over the processes, so that each process has its part of them.
            shares: Parts of kinds that a process has, where the model is whole (ZeRO 1 and 2).
        """
        tile_rows = self.head.count_tile_rows(batch, self.length)
        shares = dict.fromkeys(SHARDED_KINDS, self.shards / (shards or self.shards)) if self.shards > 1 else shares or {}
        peak: dict[str, float] = {}
        for line in self.lines:
            by_kind = {kind: base + each * batch for kind, base, each in zip(MEMORY_KINDS, line.base, line.each, strict=True)}
            if accumulates and sync_each_batch:
                by_kind |= {"gradients": self.gradient_bytes, "accumulated": 0.0}
            by_kind |= {kind: by_kind[kind] * share for kind, share in shares.items()}
            by_kind["accumulated"] *= accumulates
            by_kind["tile"] = line.tile * tile_rows
            if sum(by_kind.values()) > sum(peak.values()):
                peak = by_kind
        return peak

    def count_flops(self, batch: int) -> float:
        """Count the FLOPs of a batch on a device."""
        return sum(group.count * group.work.flops.at_batch(batch) for group in self.work)

    def compute_seconds(
        self, batch: int, peaks: CardPeaks, *, accumulates: bool = False, sync_each_batch: bool = False, is_compiled: bool = False
    ) -> RooflineSeconds:
        """Compute the roofline's seconds of a batch and of the optimizer.

        Args:
            batch: Sequences on the device.
            peaks: The card's peaks.
            accumulates: Whether gradients of earlier batches are added to.
            sync_each_batch: Whether these are this process' part of them only.
            is_compiled: Whether the decoder layers are compiled.
        """
        added = 3 * self.gradient_bytes if sync_each_batch else self.adding
        of_batch, of_optimizer = added / peaks.bytes if accumulates else 0.0, 0.0
        for group in self.work:
            seconds = group.count * peaks.compute_seconds(group.work, batch, is_compiled)
            if group.once:
                of_optimizer += seconds
            else:
                of_batch += seconds
        return RooflineSeconds(of_batch, of_optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON has."""
        return {**asdict(self), "work": [[group.once, group.count, *group.work] for group in self.work]}


class RooflineSeconds(NamedTuple):
    """Seconds at a card's peaks: of a batch, and of the optimizer."""

    batch: float
    optimizer: float


def parse_step_cost(data: Mapping[str, Any]) -> StepCost:
    """Convert back from JSON."""
    return StepCost(
        length=data["length"],
        shards=data["shards"],
        parameters=ParameterCounts(**data["parameters"]),
        head=HeadShape(*data["head"]),
        gradient_bytes=data["gradient_bytes"],
        adding=data["adding"],
        lines=tuple(MemoryLine(tuple(line["base"]), tuple(line["each"]), line["tile"]) for line in data["lines"]),
        work=tuple(
            OperatorGroup(once, count, OperatorWork(BatchLinear(*flops), BatchLinear(*moved), BatchLinear(*fused), is_float32))
            for once, count, flops, moved, fused, is_float32 in data["work"]
        ),
    )
