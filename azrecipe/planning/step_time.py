"""How long a training step takes on machines that are only named.

The time is the card's roofline over the efficiency that runs have reached, and the time of the links. Nothing is measured on the machines
themselves: efficiencies come from published runs (hardware/efficiencies.yaml names each) or from the user's calibrated runs. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from azrecipe.distributed import gradient_sync
from azrecipe.distributed.backend import Backend
from azrecipe.hardware import Card, Machine, read_shipped_file
from azrecipe.planning import calibration_file
from azrecipe.planning.efficiency import EfficiencyRun, Span, classify_step, estimate_efficiency
from azrecipe.planning.simulation.step_cost import CardPeaks, RooflineSeconds, StepCost
from azrecipe.planning.simulation.step_spec import StepSpec


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
    has_card: whether a run on such a card is known. total_without_efa: the step over the same network without EFA, where machines have EFA.
    """

    total: Span
    compute: Span
    intra_node: Span
    inter_node: Span
    basis: str
    has_card: bool = True
    total_without_efa: float | None = None

    @property
    def bottleneck(self) -> str:
        """What the step waits for: `compute`, `links` in a machine, or `network`."""
        longest = max(self.compute.middle, self.intra_node.middle, self.inter_node.middle)
        if longest == self.compute.middle:
            return "compute"
        return "network" if longest == self.inter_node.middle else "links"


def estimate_step_time(
    cost: StepCost,
    step: StepSpec,
    batch: int,
    accumulation: int,
    cluster: MachineGroup,
    *,
    published: Sequence[EfficiencyRun] | None = None,
) -> StepTime:
    """Estimate an optimizer step.

    Cards and links work at the same time, so the slower one counts; the upper bound adds both.

    Args:
        cost: The simulated step.
        step: What the step does.
        batch: Sequences on each card at once.
        accumulation: Batches in an optimizer step.
        cluster: The machines.
        published: The published runs that the efficiency rests on; None: all that are known.
    """
    estimated = estimate_efficiency(cluster.machine.card, classify_step(step), calibration_file.read_efficiencies(), published)
    share, peak_seconds = estimated.share, compute_roofline(cost, step, batch, accumulation, cluster)
    compute = Span(peak_seconds / share.high, peak_seconds / share.middle, peak_seconds / share.low)
    links = _estimate_link_seconds(cost, step, accumulation, cluster)
    slower = [max(pair) for pair in zip(astuple(links.intra_node), astuple(links.inter_node), strict=True)]
    low, middle, high = (max(pair) for pair in zip(astuple(compute), slower, strict=True))
    total = Span(low, middle, high + min(compute.middle, slower[1]) * (cluster.world_size > 1))
    network, without_efa = cluster.machine.network, None
    if cluster.nodes > 1 and network is not None and network.efa_interfaces:
        # NCCL's sockets then share one interface, of which TCP moves what was seen of it
        slow_share = _load_link_rates()["ethernet"]["low"] / network.efa_interfaces
        without_efa = max(total.middle, links.inter_node.middle * _load_link_rates()["efa"]["middle"] / slow_share)
    return StepTime(total, compute, links.intra_node, links.inter_node, estimated.basis, estimated.has_card, without_efa)


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
    intra_node: Span
    inter_node: Span


def _estimate_link_seconds(cost: StepCost, step: StepSpec, accumulation: int, cluster: MachineGroup) -> _LinkSeconds:
    """Estimate how long links are busy in a step."""
    gathered, reduced = count_communication_bytes(cost, step, accumulation)
    machine, nodes = cluster.machine, cluster.nodes
    all_reduce = cluster.strategy in ("ddp", "zero1")  # moves twice what a reduce-scatter moves
    moved = gathered + (2 if all_reduce else 1) * reduced
    crossing_cards = moved * ((machine.count - 1) / machine.count)
    intra_node = _compute_link_span(crossing_cards, machine.link.gb_per_s, machine.link.kind)
    if nodes == 1 or machine.network is None:
        return _LinkSeconds(intra_node, Span(0.0, 0.0, 0.0))
    if cluster.strategy == "hsdp" and cluster.num_shards <= machine.count:  # shards stay in a machine; only their sums cross
        crossing = 2 * (nodes - 1) / nodes * reduced
    else:
        crossing = moved * ((cluster.world_size - 1) / cluster.world_size)
    kind = machine.network.kind or ("efa" if machine.network.efa_interfaces else "unknown")
    return _LinkSeconds(intra_node, _compute_link_span(crossing, machine.network.gbit_per_s / 8, kind))


def _compute_link_span(moved: float, gb_per_s: float, kind: str) -> Span:
    """Compute the seconds that bytes take over a link.

    Collectives reach a share of its rate.
    """
    share = _load_link_rates()[kind]
    return Span(*(moved / (gb_per_s * 1e9 * share[bound]) for bound in ("high", "middle", "low")))


def _load_link_rates() -> Mapping[str, Mapping[str, float]]:
    rates: Mapping[str, Mapping[str, float]] = _load_calibration()["links"]
    return rates


@cache
def _load_calibration() -> Mapping[str, Any]:
    content: Mapping[str, Any] = read_shipped_file("calibration.yaml").to_plain()
    return content
