"""Knows how long a training step takes on a machine: a roofline of the card, what the links carry, and how near to both runs have come.

Nothing here is measured on the machine that is asked about: efficiencies come from runs that others have published
(hardware/calibration.yaml names each) or from the user's own. No torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from azrecipe.distributed.backend import Backend
from azrecipe.hardware import Card, Machine, load, shipped
from azrecipe.planning import calibration_file
from azrecipe.planning.model_config import known_shapes
from azrecipe.planning.simulation.step_cost import Cost
from azrecipe.planning.simulation.step_spec import Asked

ALONE = 0.1  # how far from a card's only known run another may be
ELSEWHERE = 0.2  # the same where no run on this card is known


@dataclass(frozen=True)
class Span:
    """A quantity that is known within bounds."""

    low: float
    middle: float
    high: float

    def rate(self, amount: float) -> Span:
        """Of an amount that takes these seconds."""
        return Span(amount / self.high, amount / self.middle, amount / self.low)

    def times(self, other: float) -> Span:
        return Span(self.low * other, self.middle * other, self.high * other)


@dataclass(frozen=True)
class Cluster:
    """Machines of a kind, and how the processes on their cards share the work (backend.Backend's kind and replicate)."""

    machine: Machine
    nodes: int
    kind: str
    replicate: int = 1
    context: int = 1

    @property
    def world(self) -> int:
        return self.machine.count * self.nodes

    @property
    def backend(self) -> Backend:
        return Backend(self.kind, self.world, 0, self.replicate, self.context)

    @property
    def shards(self) -> int:
        return self.backend.shards


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer's step; what the links would take by themselves, inside a machine and between machines; and without EFA."""

    total: Span
    compute: Span
    inside: float
    between: Span
    rests_on: str
    without_efa: float | None = None

    @property
    def bound(self) -> str:
        """What the step waits for: the cards, the links inside a machine, or the network."""
        longest = max(self.compute.middle, self.inside, self.between.middle)
        if longest == self.compute.middle:
            return "compute"
        return "network" if longest == self.between.middle else "links"


def step_time(cost: Cost, asked: Asked, batch: int, accumulation: int, cluster: Cluster) -> StepTime:
    """An optimizer's step of `accumulation` batches on each card. Links work beside the card: the longer one counts, and both at worst."""
    found, rests_on = efficiency(cluster.machine.card.name, calibration_file.efficiencies())
    roof = roofline(cost, asked, batch, accumulation, cluster)
    compute = Span(roof / found.high, roof / found.middle, roof / found.low)
    inside, between = _links(cost, asked, accumulation, cluster)
    slowest = [max(inside, rate) for rate in (between.low, between.middle, between.high)]
    total = Span(
        max(compute.low, slowest[0]),
        max(compute.middle, slowest[1]),
        max(compute.high, slowest[2]) + min(compute.middle, slowest[1]) * (cluster.world > 1),
    )
    network, slow = cluster.machine.network, None
    if cluster.nodes > 1 and network is not None and network.efa_interfaces:
        rate = network.gbit_per_s / 8 * _rates()["efa"]["middle"]  # GB/s
        least = min(float(_calibration()["without_efa_gb_per_s"]), network.gbit_per_s / 8 * _rates()["network"]["middle"])
        slow = max(total.middle, between.middle * rate / least)
    return StepTime(total, compute, inside, between, rests_on, slow)


def roofline(cost: Cost, asked: Asked, batch: int, accumulation: int, cluster: Cluster) -> float:
    """Seconds of an optimizer's step at the card's peaks, links left out."""
    batches, optimizer = at_peaks(cost, replace(asked, accumulates=accumulation > 1), batch, cluster.machine.card)
    optimizer *= cost.shards / cluster.shards if cost.shards > 1 else 1.0 / (cluster.world if asked.zero else 1)
    return batches * accumulation + optimizer


def at_peaks(cost: Cost, asked: Asked, batch: int, card: Card) -> tuple[float, float]:
    """The same of a batch and of the optimizer, as the step was run."""
    peak = card.fp32_tflops if asked.precision == "float32" else card.bf16_tflops
    return cost.seconds(batch, peak * 1e12, card.memory_gb_per_s * 1e9, asked.adds_up)


def volumes(cost: Cost, asked: Asked, accumulation: int) -> tuple[float, float]:
    """Bytes a step that every process must get of parameters, and that must be added up of gradients.

    FSDP 2 as Accelerate puts it on: all parameters for the forward pass, and again for the backward pass but the head's. Gradients accumulate in
    each process and are added up once; DeepSpeed's ZeRO 2 and 3 add them up for every batch.
    """
    parameters = cost.parameters
    width = 4 if asked.precision == "float32" else 2
    summed = parameters.trainable * (2 if asked.precision == "bf16_pure" else 4)
    if asked.kind in ("zero2", "zero3"):
        summed *= accumulation
    if cost.shards == 1:
        again = parameters.trainable * width if asked.zero else 0
        return float(again), float(summed)
    _, vocabulary, of_row = cost.head
    again = parameters.total - vocabulary * of_row if asked.reshard_after_forward else 0
    return float((parameters.total + again) * width * accumulation), float(summed)


def _links(cost: Cost, asked: Asked, accumulation: int, cluster: Cluster) -> tuple[float, Span]:
    """Seconds that the links inside a machine, and those between machines, are busy in a step."""
    gathered, summed = volumes(cost, asked, accumulation)
    rates, machine, nodes = _rates(), cluster.machine, cluster.nodes
    inner = machine.link.gb_per_s * 1e9 * rates[machine.link.kind]["middle"]
    whole = cluster.kind in ("ddp", "zero1")
    ring = (cluster.world - 1) / cluster.world
    local = (machine.count - 1) / machine.count
    inside = (gathered + (2 if whole else 1) * summed) * local / inner
    if nodes == 1 or machine.network is None:
        return inside, Span(0.0, 0.0, 0.0)
    outer = machine.network.gbit_per_s / 8 * 1e9
    if cluster.kind == "hsdp" and cluster.shards <= machine.count:  # shards stay inside; their sums go round the machines
        crossing = 2 * (nodes - 1) / nodes * summed
    else:
        crossing = (gathered + (2 if whole else 1) * summed) * ring
    found = rates["efa" if machine.network.efa_interfaces else "network"]
    return inside, Span(crossing / (outer * found["high"]), crossing / (outer * found["middle"]), crossing / (outer * found["low"]))


def efficiency(card: str, more: Sequence[Mapping[str, Any]] = ()) -> tuple[Span, str]:
    """The share of the roofline that training on a card has reached, and what that rests on. `more`: loops of a user's own runs, which count alone."""
    known, cards = _calibration()["runs"], load().cards
    own = [run for run in more if run["card"] == card]
    peak = cards[card].bf16_tflops if card in cards else None  # cards of one peak are one chip, with more or less memory
    same = own or [run for run in known if cards[run["card"]].bf16_tflops == peak]
    shares = [float(run["efficiency"]) for run in same or known]
    middle = statistics.median(shares)
    spread = ALONE if same else ELSEWHERE
    low, high = min(*shares, middle * (1 - spread)), min(max(*shares, middle * (1 + spread)), 1.0)
    if own:
        said = f"{len(own)} training loop{'s' if len(own) > 1 else ''} of your own on {card}"
    elif same:
        said = f"{len(same)} published run{'s' if len(same) > 1 else ''} on {', '.join(sorted({str(run['card']) for run in same}))}"
    else:
        said = f"published runs on other cards ({', '.join(sorted({str(run['card']) for run in known}))}): none on {card} is known"
    return Span(low, middle, high), said


@dataclass(frozen=True)
class Run:
    """A run whose rate is known: tokens/s of one card, and what its step was."""

    card: str
    what: str
    asked: Asked
    length: int
    batch: int
    tokens_per_second: float
    efficiency: float

    def reckoned(self, cost: Cost) -> float:
        """The share of the roofline that it reached: the roofline's time of a step over the time that it took."""
        batch, optimizer = at_peaks(cost, self.asked, self.batch, load().cards[self.card])
        return (batch + optimizer) * self.tokens_per_second / (self.batch * self.length)


def published() -> list[Run]:
    """The runs in hardware/calibration.yaml."""
    found = []
    for run in _calibration()["runs"]:
        how = dict(run["run"])
        length, batch = how.pop("length"), how.pop("batch")
        how["kernels"] = tuple(how.get("kernels", ()))
        model = run["model"] if isinstance(run["model"], dict) else known_shapes()[run["model"]]
        asked = Asked(config=model, **how)
        found.append(Run(run["card"], run["what"], asked, length, batch, run["tokens_per_second"], run["efficiency"]))
    return found


def _rates() -> Mapping[str, Mapping[str, float]]:
    rates: Mapping[str, Mapping[str, float]] = _calibration()["links"]
    return rates


@cache
def _calibration() -> Mapping[str, Any]:
    known: Mapping[str, Any] = shipped("calibration.yaml").plain()
    return known
