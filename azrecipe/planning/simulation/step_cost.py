"""Knows what a training step takes at any batch: bytes by kind, operations, bytes moved; made of a recorded step. No torch.

Live bytes after an operator are linear in the batch, and in the number of equal decoder layers; which operator has the most is not.
So every operator's line is kept that is the highest for some batch, and the peak is the highest of the lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from azrecipe.planning.simulation.loss_tiles import rows, tokens

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "unsharded", "communication", "buffers", "temporary", "accumulated")
SHARDED = ("weights", "gradients", "optimizer")  # what a process has a part of, where the model is split

TEMPORARY, ACCUMULATED = KINDS.index("temporary"), KINDS.index("accumulated")

Place = tuple[str, int]  # start, forward i, head, backward i (from the head's, which has the number of layers, to the first's), step
Pair = tuple[float, float]  # base and each: base + each * batch


@dataclass(frozen=True, slots=True)
class Event:
    """After an operator: where the step is, bytes by kind, base and each, bytes of tiles, and the operator's FLOPs and bytes moved.

    accumulated is negative: bytes of what earlier batches left that are no longer held beside this one's own.
    """

    place: Place
    base: tuple[int, ...]
    each: tuple[float, ...]
    tile: float
    flops: Pair = (0.0, 0.0)
    moved: Pair = (0.0, 0.0)


@dataclass(frozen=True)
class Recorded:
    """One step of `batch` sequences: its events, and what does not depend on them.

    layers: those that it was run with. of_layer: bytes at rest that a further layer adds, by kind. trained: trainable bytes of it, and of all.
    """

    batch: int
    length: int
    layers: int
    events: list[Event]
    of_layer: Mapping[str, int]
    grows: float  # what trains in the whole model / in these layers
    added: float  # width of a number of a gradient / of one that gradients are added up in
    tokens_wide: tuple[str, int, int]  # the head: its kind, vocabulary, width

    @property
    def rows(self) -> int:
        """Rows of a tile in this step."""
        kind, vocabulary, width = self.tokens_wide
        return rows(kind, tokens(kind, self.batch, self.length), vocabulary, width) if kind != "logits" else 1


@dataclass(frozen=True)
class Parameters:
    total: int
    trainable: int
    embeddings: int
    bytes: int
    trainable_bytes: int


@dataclass(frozen=True)
class Line:
    """bytes by kind = base + each * batch, and bytes of tiles for each row of one."""

    base: tuple[float, ...]
    each: tuple[float, ...]
    tile: float

    def at(self, batch: int, held_rows: int) -> float:
        return sum(self.base) + sum(self.each) * batch + self.tile * held_rows


@dataclass(frozen=True)
class Work:
    """Operators of one size: how many, FLOPs and bytes moved by each, both base + each * batch.

    once: they are the optimizer's, which works once a step on this process' part, however often batches accumulate.
    """

    once: bool
    count: float
    flops: tuple[float, float]
    moved: tuple[float, float]


@dataclass(frozen=True)
class Cost:
    """A step of a length on each of `shards` processes. adding: bytes that move where a batch's gradients are added to earlier ones'."""

    length: int
    shards: int
    parameters: Parameters
    head: tuple[str, int, int]
    lines: tuple[Line, ...]
    work: tuple[Work, ...]
    adding: float

    def memory(self, batch: int, shards: int | None = None, accumulates: bool = False) -> dict[str, float]:
        """Bytes by kind where the peak is; `tile` apart. `shards`: over as many processes instead. accumulates: after other batches."""
        held = self._rows(batch)
        share = self.shards / shards if shards else 1.0
        best: dict[str, float] = {}
        for line in self.lines:
            found = {kind: a + b * batch for kind, a, b in zip(KINDS, line.base, line.each, strict=True)}
            if self.shards > 1:
                found |= {kind: found[kind] * share for kind in SHARDED}
            found["accumulated"] *= accumulates
            found["tile"] = line.tile * held
            if sum(found.values()) > sum(best.values()):
                best = found
        return best

    def flops(self, batch: int) -> float:
        """FLOPs of a batch on a device."""
        return sum(work.count * (work.flops[0] + work.flops[1] * batch) for work in self.work)

    def seconds(self, batch: int, flops_per_second: float, bytes_per_second: float, accumulates: bool = False) -> tuple[float, float]:
        """The roofline's, of a batch and of the optimizer: an operator takes as long as its arithmetic or its memory, whichever is longer."""
        found = [self.adding / bytes_per_second if accumulates else 0.0, 0.0]
        for work in self.work:
            flops, moved = work.flops[0] + work.flops[1] * batch, work.moved[0] + work.moved[1] * batch
            found[work.once] += work.count * max(flops / flops_per_second, moved / bytes_per_second)
        return found[0], found[1]

    def _rows(self, batch: int) -> int:
        kind, vocabulary, width = self.head
        return rows(kind, tokens(kind, batch, self.length), vocabulary, width) if kind != "logits" else 0

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def from_plain(data: Mapping[str, Any]) -> Cost:
    """The same from JSON."""
    return Cost(
        length=data["length"],
        shards=data["shards"],
        parameters=Parameters(**data["parameters"]),
        head=tuple(data["head"]),
        adding=data["adding"],
        lines=tuple(Line(tuple(line["base"]), tuple(line["each"]), line["tile"]) for line in data["lines"]),
        work=tuple(Work(work["once"], work["count"], tuple(work["flops"]), tuple(work["moved"])) for work in data["work"]),
    )


def cost(step: Recorded, layers: int, parameters: Parameters, shards: int) -> Cost:
    """From a recorded step. `layers`: the model's own number of decoder layers."""
    import numpy as np

    base, each = _whole(step, layers)
    tiles = np.array([event.tile for event in step.events], dtype=np.float64) / step.rows
    kind, vocabulary, width = step.tokens_wide
    grid = np.array([*range(1, 65), *(2**k for k in range(7, 13))], dtype=np.float64)
    held_rows = np.array([rows(kind, tokens(kind, int(b), step.length), vocabulary, width) if kind != "logits" else 0 for b in grid])
    total = base[:, :ACCUMULATED].sum(1)[:, None] + each.sum(1)[:, None] * grid + tiles[:, None] * held_rows
    # Over fewer processes what is at rest weighs more, which can move the peak: the highest for an eighth and eight times as many count too
    still = base[:, : len(SHARDED)].sum(1)[:, None]
    shares = [(share - 1) * still for share in ((1.0, 8.0, 0.125) if shards > 1 else (1.0,))]
    best = {int(i) for more in (0.0, base[:, ACCUMULATED, None]) for share in shares for i in (total + more + share).argmax(0)}
    adding = float(base[0, ACCUMULATED]) * (2 + step.added)  # what is there is read and written, what is added is read
    lines = tuple(Line(tuple(base[i].tolist()), tuple(each[i].tolist()), float(tiles[i])) for i in sorted(best))
    return Cost(step.length, shards, parameters, step.tokens_wide, lines, _work(step, layers), adding)


Held = list[float]


def _whole(step: Recorded, layers: int) -> tuple[Any, Any]:
    """Bytes by kind after each operator, base and each [operators, kinds], as they would be with all layers.

    The layers that were left out stand before the last two: what they add at rest is everywhere, what they keep for the backward pass from
    the last two on until their own backward, and their gradients from there on. What earlier batches left is there from the first operator
    on, and none of it at the last.
    """
    import numpy as np

    base, each = (np.array(held, dtype=np.float64) for held in zip(*((event.base, event.each) for event in step.events), strict=True))
    extra = layers - step.layers
    if extra:
        rest: list[Held] = [[float(step.of_layer.get(kind, 0)) for kind in KINDS], [0.0] * len(KINDS)]
        more = np.array([rest, *(_sum(rest, added) for added in _of_layer(step.events))])
        which = [_stage(event.place, step.layers - 1) for event in step.events]
        base, each = base + extra * more[which, 0], each + extra * more[which, 1]
        at_step = [event.place[0] == "step" for event in step.events]
        base[at_step, TEMPORARY] = [event.base[TEMPORARY] * step.grows for event in step.events if event.place[0] == "step"]
    base[:, ACCUMULATED] -= base[-1, ACCUMULATED]
    return base, each


def _stage(place: Place, last: int) -> int:
    """Of the layers left out: 0 before their forward pass, 1 after it, 2 before their backward pass, 3 after it."""
    where, number = place
    if where == "start" or (where == "forward" and number < last - 1):
        return 0
    if where in ("forward", "head"):
        return 1
    return 2 if where == "backward" and number >= last - 1 else 3


def _sum(one: Sequence[Held], other: Sequence[Held]) -> list[Held]:
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)]


def _less(one: Sequence[Held], other: Sequence[Held]) -> list[Held]:
    return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)]


def _difference(one: Event, other: Event) -> list[Held]:
    return [[float(a - b) for a, b in zip(x, y, strict=True)] for x, y in ((one.base, other.base), (one.each, other.each))]


def _of_layer(events: Sequence[Event]) -> tuple[list[Held], list[Held], list[Held]]:
    """What a layer in the middle keeps while the forward pass goes on, keeps for its backward pass, and leaves behind after it.

    Each beyond what it had before. Autocast keeps weights in bfloat16 until the end of the forward pass, whoever may want them later.
    """
    last = {event.place: event for event in events}
    kept = _difference(last[("forward", 2)], last[("forward", 1)])
    if ("backward", 2) not in last or ("backward", 3) not in last:
        return kept, kept, [[0.0] * len(KINDS)] * 2
    # The layer behind the second: at the end of the first FSDP gathers no further one
    after = _sum(kept, _difference(last[("backward", 2)], last[("backward", 3)]))
    until = [[value if kind == "activations" else 0.0 for kind, value in zip(KINDS, held, strict=True)] for held in after]
    return kept, _less(kept, until), _less(after, until)


def _work(step: Recorded, layers: int) -> tuple[Work, ...]:
    """Operators of a size, and how many of them there are: a middle layer's stand for those of the layers left out."""
    extra = layers - step.layers
    counted: dict[tuple[bool, Pair, Pair], float] = {}
    for event in step.events:
        where, number = event.place
        if not any((*event.flops, *event.moved)):
            continue
        times = 1.0 + (extra if (where, number) in (("forward", 1), ("backward", 2)) else 0)
        grow = step.grows if where == "step" and extra else 1.0
        key = (where == "step", _grown(event.flops, grow), _grown(event.moved, grow))
        counted[key] = counted.get(key, 0.0) + times
    return tuple(Work(once, count, flops, moved) for (once, flops, moved), count in counted.items())


def _grown(pair: Pair, by: float) -> Pair:
    return pair[0] * by, pair[1] * by
