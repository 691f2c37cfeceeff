"""How long a training step takes on machines that are only named.

The time is the card's roofline over the efficiency that runs have reached, and the time of the links. Nothing is measured on the machines
themselves: efficiencies come from published runs (hardware/calibration.yaml names each) or from the user's calibrated runs. No torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from azrecipe.distributed import gradient_sync
from azrecipe.distributed.backend import Backend
from azrecipe.hardware import Card, Machine, load_catalog, read_shipped_file
from azrecipe.planning import calibration_file
from azrecipe.planning.model_config import load_shipped_configs
from azrecipe.planning.simulation.step_cost import CardPeaks, RooflineSeconds, StepCost
from azrecipe.planning.simulation.step_spec import StepSpec

SAME_CARD_SPREAD = 0.1  # relative spread where runs on this card are known
OTHER_CARD_SPREAD = 0.2  # relative spread where only runs on other cards are known


@dataclass(frozen=True)
class Span:
    """A quantity with bounds."""

    low: float
    middle: float
    high: float

    def to_rate(self, amount: float) -> Span:
        """Convert seconds for an amount into an amount per second."""
        return Span(amount / self.high, amount / self.middle, amount / self.low)

    def multiply(self, factor: float) -> Span:
        return Span(self.low * factor, self.middle * factor, self.high * factor)


@dataclass(frozen=True)
class MachineGroup:
    """Machines of one type, and how their processes share the work.

    strategy, replicate_size, context_parallel_size: as in distributed.backend.Backend.
    """

    machine: Machine
    nodes: int
    strategy: str
    replicate_size: int = 1
    context_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return self.machine.count * self.nodes

    @property
    def backend(self) -> Backend:
        return Backend(self.strategy, self.world_size, 0, self.replicate_size, self.context_parallel_size)

    @property
    def num_shards(self) -> int:
        return self.backend.num_shards


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    total: the whole step. compute: the cards alone. intra_node, inter_node: the links alone. basis: what the efficiency rests on, in words.
    total_without_efa: the step over a network without EFA, where machines have EFA.
    """

    total: Span
    compute: Span
    intra_node: float
    inter_node: Span
    basis: str
    total_without_efa: float | None = None

    @property
    def bottleneck(self) -> str:
        """What the step waits for: `compute`, `links` in a machine, or `network`."""
        longest = max(self.compute.middle, self.intra_node, self.inter_node.middle)
        if longest == self.compute.middle:
            return "compute"
        return "network" if longest == self.inter_node.middle else "links"


def estimate_step_time(cost: StepCost, step: StepSpec, batch: int, accumulation: int, cluster: MachineGroup) -> StepTime:
    """Estimate an optimizer step.

    Cards and links work at the same time, so the slower one counts; the upper bound adds both.

    Args:
        cost: The simulated step.
        step: What the step does.
        batch: Sequences on each card at once.
        accumulation: Batches in an optimizer step.
        cluster: The machines.
    """
    estimated = estimate_efficiency(cluster.machine.card.name, calibration_file.read_efficiencies())
    share, peak_seconds = estimated.share, compute_roofline(cost, step, batch, accumulation, cluster)
    compute = Span(peak_seconds / share.high, peak_seconds / share.middle, peak_seconds / share.low)
    links = _estimate_link_seconds(cost, step, accumulation, cluster)
    low, middle, high = (max(links.intra_node, value) for value in (links.inter_node.low, links.inter_node.middle, links.inter_node.high))
    total = Span(
        max(compute.low, low),
        max(compute.middle, middle),
        max(compute.high, high) + min(compute.middle, middle) * (cluster.world_size > 1),
    )
    network, without_efa = cluster.machine.network, None
    if cluster.nodes > 1 and network is not None and network.efa_interfaces:
        bandwidth = network.gbit_per_s / 8  # GB/s
        efa_rate, tcp_rate = (bandwidth * _load_link_rates()[kind]["middle"] for kind in ("efa", "network"))
        slow_rate = min(float(_load_calibration()["without_efa_gb_per_s"]), tcp_rate)
        without_efa = max(total.middle, links.inter_node.middle * efa_rate / slow_rate)
    return StepTime(total, compute, links.intra_node, links.inter_node, estimated.basis, without_efa)


def compute_roofline(cost: StepCost, step: StepSpec, batch: int, accumulation: int, cluster: MachineGroup) -> float:
    """Compute an optimizer step's seconds at the card's peaks.

    Args:
        cost: The simulated step.
        step: What the step does.
        batch: Sequences on each card at once.
        accumulation: Batches in an optimizer step.
        cluster: The machines.
    """
    seconds = compute_peak_seconds(cost, replace(step, accumulates=accumulation > 1), batch, cluster.machine.card)
    optimizer_share = cost.shards / cluster.num_shards if cost.shards > 1 else 1.0 / (cluster.world_size if step.uses_deepspeed else 1)
    return seconds.batch * accumulation + seconds.optimizer * optimizer_share


def compute_peak_seconds(cost: StepCost, step: StepSpec, batch: int, card: Card) -> RooflineSeconds:
    """Compute a batch's and the optimizer's seconds at a card's peaks.

    Args:
        cost: The simulated step; its number of shards counts, not the machines'.
        step: What the step does.
        batch: Sequences on the card.
        card: The card.
    """
    peaks = CardPeaks(card.bf16_tflops * 1e12, card.fp32_tflops * 1e12, card.memory_gb_per_s * 1e9)
    synced = _syncs_each_batch(cost, step)
    return cost.compute_seconds(batch, peaks, accumulates=step.keeps_gradients, sync_each_batch=synced, is_compiled=step.torch_compile)


def _syncs_each_batch(cost: StepCost, step: StepSpec) -> bool:
    """Return whether a split model's gradients are summed after every batch."""
    return cost.shards > 1 and gradient_sync.syncs_each_batch(step.sync_each_batch, cost.shards, cost.parameters.trainable_bytes)


class CommunicationBytes(NamedTuple):
    """Bytes of an optimizer step: gathered parameters, and gradients to sum."""

    gathered: float
    reduced: float


def count_communication_bytes(cost: StepCost, step: StepSpec, accumulation: int) -> CommunicationBytes:
    """Count the bytes that a process gathers and reduces.

    FSDP 2 as Accelerate sets it up gathers all parameters for the forward pass, and again for the backward pass, without the head's.
    Gradients accumulate in each process and are reduced once, or after every batch (training.sync_each_batch); DeepSpeed's ZeRO 2 and 3
    reduce them after every batch.
    """
    parameters = cost.parameters
    width = 4 if step.precision == "float32" else 2
    reduced = parameters.trainable * (2 if step.precision == "bf16_pure" else 4)
    if step.strategy in ("zero2", "zero3") or _syncs_each_batch(cost, step):
        reduced *= accumulation
    if cost.shards == 1:
        updated = parameters.trainable * width if step.uses_deepspeed else 0
        return CommunicationBytes(float(updated), float(reduced))
    regathered = parameters.total - cost.head.vocab_size * cost.head.width if step.reshard_after_forward else 0
    return CommunicationBytes(float((parameters.total + regathered) * width * accumulation), float(reduced))


class _LinkSeconds(NamedTuple):
    intra_node: float
    inter_node: Span


def _estimate_link_seconds(cost: StepCost, step: StepSpec, accumulation: int, cluster: MachineGroup) -> _LinkSeconds:
    """Estimate how long links are busy in a step."""
    gathered, reduced = count_communication_bytes(cost, step, accumulation)
    rates, machine, nodes = _load_link_rates(), cluster.machine, cluster.nodes
    all_reduce = cluster.strategy in ("ddp", "zero1")  # moves twice what a reduce-scatter moves
    moved = gathered + (2 if all_reduce else 1) * reduced
    intra_bandwidth = machine.link.gb_per_s * 1e9 * rates[machine.link.kind]["middle"]
    intra_node = moved * ((machine.count - 1) / machine.count) / intra_bandwidth
    if nodes == 1 or machine.network is None:
        return _LinkSeconds(intra_node, Span(0.0, 0.0, 0.0))
    inter_bandwidth = machine.network.gbit_per_s / 8 * 1e9
    if cluster.strategy == "hsdp" and cluster.num_shards <= machine.count:  # shards stay in a machine; only their sums cross
        crossing = 2 * (nodes - 1) / nodes * reduced
    else:
        crossing = moved * ((cluster.world_size - 1) / cluster.world_size)
    share = rates["efa" if machine.network.efa_interfaces else "network"]
    low, middle, high = (crossing / (inter_bandwidth * share[key]) for key in ("high", "middle", "low"))
    return _LinkSeconds(intra_node, Span(low, middle, high))


class Efficiency(NamedTuple):
    """The share of the roofline that training reaches, and its basis."""

    share: Span
    basis: str


def estimate_efficiency(card: str, user_loops: Sequence[Mapping[str, Any]] = ()) -> Efficiency:
    """Estimate the share of the roofline that training on a card reaches.

    user_loops: calibrated loops of the user. Where some ran on this card, they count alone.
    """
    published_runs, cards = _load_calibration()["runs"], load_catalog().cards
    calibrated = [run for run in user_loops if run["card"] == card]
    peak = cards[card].bf16_tflops if card in cards else None  # cards of one peak are one chip, with more or less memory
    same_chip = calibrated or [run for run in published_runs if cards[run["card"]].bf16_tflops == peak]
    shares = [float(run["efficiency"]) for run in same_chip or published_runs]
    middle = statistics.median(shares)
    spread = SAME_CARD_SPREAD if same_chip else OTHER_CARD_SPREAD
    low, high = min(*shares, middle * (1 - spread)), min(max(*shares, middle * (1 + spread)), 1.0)
    names = ", ".join(sorted({str(run["card"]) for run in same_chip or published_runs}))
    plural = "s" if len(same_chip) > 1 else ""
    if calibrated:
        basis = f"{len(calibrated)} training loop{plural} of your own on {card}"
    elif same_chip:
        basis = f"{len(same_chip)} published run{plural} on {names}"
    else:
        basis = f"published runs on other cards ({names}): none on {card} is known"
    return Efficiency(Span(low, middle, high), basis)


@dataclass(frozen=True)
class PublishedRun:
    """A published run: its step, and its tokens/s on one card.

    efficiency: its share of the roofline. compute_efficiency() computes it from a simulated step.
    """

    card: str
    title: str
    step: StepSpec
    length: int
    batch: int
    tokens_per_second: float
    efficiency: float

    def compute_efficiency(self, cost: StepCost) -> float:
        """Compute the roofline's time of a step over the run's time."""
        seconds = compute_peak_seconds(cost, self.step, self.batch, load_catalog().cards[self.card])
        return (seconds.batch + seconds.optimizer) * self.tokens_per_second / (self.batch * self.length)


def load_published_runs() -> list[PublishedRun]:
    """Load the runs in hardware/calibration.yaml."""
    runs = []
    for entry in _load_calibration()["runs"]:
        config = entry["model"] if isinstance(entry["model"], dict) else load_shipped_configs()[entry["model"]]
        settings = dict(entry["run"])
        length, batch = settings.pop("length"), settings.pop("batch")
        step = StepSpec(config=config, strategy=settings.pop("kind", "single"), kernels=tuple(settings.pop("kernels", ())), **settings)
        runs.append(PublishedRun(entry["card"], entry["what"], step, length, batch, entry["tokens_per_second"], entry["efficiency"]))
    return runs


def _load_link_rates() -> Mapping[str, Mapping[str, float]]:
    rates: Mapping[str, Mapping[str, float]] = _load_calibration()["links"]
    return rates


@cache
def _load_calibration() -> Mapping[str, Any]:
    content: Mapping[str, Any] = read_shipped_file("calibration.yaml").to_plain()
    return content
