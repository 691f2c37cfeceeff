"""One recorded step, and the cost at any batch that it shows.

Live bytes after an operator are linear in the batch and in the number of equal decoder layers. Which operator has the most bytes is not
linear. So the line of every operator that is the highest at some batch is kept. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from azrecipe.planning.simulation.step_cost import (
    MEMORY_KINDS,
    NO_WORK,
    OPTIMIZER_KINDS,
    SHARDED_KINDS,
    HeadShape,
    MemoryLine,
    OperatorGroup,
    OperatorWork,
    ParameterCounts,
    StepCost,
)

_SHARES = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0)  # of what is simulated, for other numbers of processes: the peak may be elsewhere

_GRADIENTS, _OPTIMIZER_TEMPORARY, _ACCUMULATED = (MEMORY_KINDS.index(kind) for kind in ("gradients", "optimizer_temporary", "accumulated"))
_ONE_BATCH_COLUMNS = slice(_ACCUMULATED)


class StepPosition(NamedTuple):
    """Where a step is.

    stage: `start`, `forward`, `head`, `backward` or `step`. layer: the number of the decoder layer. The backward pass counts down from the
    number of layers, which stands for the head.
    """

    stage: str
    layer: int = 0


@dataclass(frozen=True, slots=True)
class StepEvent:
    """The state after an operator, and the operator's work.

    base, each: live bytes by kind (in the order of MEMORY_KINDS), linear in the batch. tile: live bytes of logit tiles. accumulated bytes
    are negative: what earlier batches left and this batch has replaced.
    """

    position: StepPosition
    base: tuple[int, ...]
    each: tuple[float, ...]
    tile: float
    work: OperatorWork = NO_WORK


@dataclass(frozen=True)
class RecordedStep:
    """One recorded step.

    layers: decoder layers that it was run with. layer_bytes: bytes at rest that a further layer adds, by kind. trainable_ratio: what trains
    in the whole model over what trains in these layers. grad_dtype_ratio: bytes of a gradient's number over bytes of one that gradients are
    summed in.
    """

    batch: int
    length: int
    layers: int
    events: list[StepEvent]
    layer_bytes: Mapping[str, int]
    trainable_ratio: float
    grad_dtype_ratio: float
    head: HeadShape

    @property
    def tile_rows(self) -> int:
        """Rows of a logit tile in this step; 1 without tiles."""
        return self.head.count_tile_rows(self.batch, self.length) or 1


def compute_step_cost(recorded: RecordedStep, layers: int, parameters: ParameterCounts, shards: int) -> StepCost:
    """Compute a step's cost at any batch from a recording.

    Args:
        recorded: The step, run with a few layers.
        layers: Decoder layers of the whole model.
        parameters: The whole model's parameters.
        shards: Processes that the model was split over.
    """
    import numpy as np

    base, each = _extend_to_all_layers(recorded, layers)
    tiles = np.array([event.tile for event in recorded.events], dtype=np.float64) / recorded.tile_rows
    batches = np.array([*range(1, 65), *(2**k for k in range(7, 13))], dtype=np.float64)
    tile_rows = np.array([recorded.head.count_tile_rows(int(batch), recorded.length) for batch in batches])
    total = base[:, _ONE_BATCH_COLUMNS].sum(1)[:, None] + each.sum(1)[:, None] * batches + tiles[:, None] * tile_rows
    split_kinds = (SHARDED_KINDS,) if shards > 1 else (OPTIMIZER_KINDS, ("gradients", *OPTIMIZER_KINDS))
    splits = [base[:, [MEMORY_KINDS.index(kind) for kind in kinds]].sum(1)[:, None] for kinds in split_kinds]
    shifts = [(share - 1) * split for share in _SHARES for split in splits]
    gradient_bytes = float(base[:, _GRADIENTS].max())
    earlier = (0.0, base[:, _ACCUMULATED, None], gradient_bytes - base[:, _GRADIENTS, None])  # of no batch, whole, and this process' part
    peaks = {int(i) for gradients in earlier for shift in shifts for i in (total + gradients + shift).argmax(0)}
    adding = float(base[0, _ACCUMULATED]) * (2 + recorded.grad_dtype_ratio)  # the sum is read and written, the new gradient is read
    lines = tuple(MemoryLine(tuple(base[i].tolist()), tuple(each[i].tolist()), float(tiles[i])) for i in sorted(peaks))
    work = _group_operators(recorded, layers)
    return StepCost(recorded.length, shards, parameters, recorded.head, lines, work, gradient_bytes, adding)


@dataclass(frozen=True)
class _KindBytes:
    """Bytes by kind, in the order of MEMORY_KINDS, linear in the batch."""

    base: tuple[float, ...]
    each: tuple[float, ...]

    def __add__(self, other: _KindBytes) -> _KindBytes:
        return _KindBytes(_add(self.base, other.base), _add(self.each, other.each))

    def __sub__(self, other: _KindBytes) -> _KindBytes:
        return _KindBytes(_subtract(self.base, other.base), _subtract(self.each, other.each))


def _add(values: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(values, others, strict=True))


def _subtract(values: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(a - b) for a, b in zip(values, others, strict=True))


_NO_BYTES = _KindBytes((0.0,) * len(MEMORY_KINDS), (0.0,) * len(MEMORY_KINDS))


def _extend_to_all_layers(recorded: RecordedStep, layers: int) -> tuple[Any, Any]:
    """Compute base and each [operators, kinds] for all layers.

    The layers that were not run lie before the last two. Their bytes at rest are always there. What they keep for the backward pass is
    there from the last two on until their own backward pass, and their gradients from then on. What earlier batches left is there from the
    first operator on, and none of it at the last one.
    """
    import numpy as np

    base, each = (
        np.array(values, dtype=np.float64) for values in zip(*((event.base, event.each) for event in recorded.events), strict=True)
    )
    missing = layers - recorded.layers
    if missing:
        at_rest = _KindBytes(tuple(float(recorded.layer_bytes.get(kind, 0)) for kind in MEMORY_KINDS), _NO_BYTES.each)
        by_progress = [at_rest, *(at_rest + layer for layer in _measure_middle_layer(recorded.events))]
        layer_bytes = np.array([(layer.base, layer.each) for layer in by_progress])
        progress = [_get_progress(event.position, recorded.layers - 1) for event in recorded.events]
        base, each = base + missing * layer_bytes[progress, 0], each + missing * layer_bytes[progress, 1]
        in_optimizer = [event.position.stage == "step" for event in recorded.events]
        base[in_optimizer, _OPTIMIZER_TEMPORARY] = [
            event.base[_OPTIMIZER_TEMPORARY] * recorded.trainable_ratio for event in recorded.events if event.position.stage == "step"
        ]
    base[:, _ACCUMULATED] -= base[-1, _ACCUMULATED]
    return base, each


def _get_progress(position: StepPosition, last_layer: int) -> int:
    """Return how far the missing layers are.

    0: before their forward pass, 1: after it, 2: before their backward pass, 3: after it.
    """
    stage, layer = position
    if stage == "start" or (stage == "forward" and layer < last_layer - 1):
        return 0
    if stage in ("forward", "head"):
        return 1
    return 2 if stage == "backward" and layer >= last_layer - 1 else 3


class _MiddleLayer(NamedTuple):
    """Bytes that a middle layer adds.

    forward: until the forward pass ends. backward: until its backward pass. after: after its backward pass.
    """

    forward: _KindBytes
    backward: _KindBytes
    after: _KindBytes


def _measure_middle_layer(events: Sequence[StepEvent]) -> _MiddleLayer:
    """Measure what a middle layer adds to the live bytes.

    Until the forward pass ends a layer may keep more than its backward pass needs: autocast keeps weights in bfloat16.
    """
    last = {event.position: event for event in events}

    def difference(position: StepPosition, previous: StepPosition) -> _KindBytes:
        one, other = last[position], last[previous]
        return _KindBytes(_subtract(one.base, other.base), _subtract(one.each, other.each))

    forward = difference(StepPosition("forward", 2), StepPosition("forward", 1))
    if StepPosition("backward", 2) not in last or StepPosition("backward", 3) not in last:
        return _MiddleLayer(forward, forward, _NO_BYTES)
    # The second layer's backward pass, not the first's: at the end of the first one FSDP gathers no further layer
    change = forward + difference(StepPosition("backward", 2), StepPosition("backward", 3))
    activations = _KindBytes(*(_keep_activations(values) for values in (change.base, change.each)))
    return _MiddleLayer(forward, forward - activations, change - activations)


def _keep_activations(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(value if kind == "activations" else 0.0 for kind, value in zip(MEMORY_KINDS, values, strict=True))


def _group_operators(recorded: RecordedStep, layers: int) -> tuple[OperatorGroup, ...]:
    """Group operators of one size.

    A middle layer's operators stand for those of the missing layers too.
    """
    missing = layers - recorded.layers
    counts: dict[tuple[bool, OperatorWork], float] = {}
    for event in recorded.events:
        if not any((*event.work.flops, *event.work.moved, *event.work.fused)):
            continue
        in_optimizer = event.position.stage == "step"
        count = 1.0 + (missing if event.position in (StepPosition("forward", 1), StepPosition("backward", 2)) else 0)
        ratio = recorded.trainable_ratio if in_optimizer and missing else 1.0
        key = (in_optimizer, event.work.scale(ratio))
        counts[key] = counts.get(key, 0.0) + count
    return tuple(OperatorGroup(once, count, work) for (once, work), count in counts.items())
