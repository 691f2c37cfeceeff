"""What the planner says of each published point, and how often the published figure lies in the range that it shows.

Used by plan_published.py --points. A rate is inside if it lies in the range of tokens a second that a plan shows. Memory is compared with the peak
of tensors where the source reports that, and with the range around it (from CUDA's context to fragmentation) elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from published_points import PublishedPoint

from azrecipe import hardware
from azrecipe.hardware import GIB, Network
from azrecipe.planning import memory_budget, step_time
from azrecipe.planning.efficiency import EfficiencyRun, Span, classify_step
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.step_time import MachineGroup

SHORTEST_STEP = 2000  # tokens on a card at once: a shorter step may wait for the launch of its kernels, which no roofline knows


@dataclass(frozen=True)
class Prediction:
    """A point beside what the planner says of it.

    roofline, links: seconds of an optimizer step at the cards' peaks, and of the slower link. rate: tokens a second of one card.
    """

    point: PublishedPoint
    rate: Span
    basis: str
    bottleneck: str
    roofline: float
    links: float
    peak: float
    least: float
    most: float

    @property
    def tokens(self) -> int:
        return self.point.batch * self.point.accumulation * self.point.length

    @property
    def efficiency(self) -> float | None:
        """The share of the roofline that the published rate reaches."""
        rate = self.point.tokens_per_second
        return None if rate is None else self.roofline * rate / self.tokens

    @property
    def rate_error(self) -> float | None:
        rate = self.point.tokens_per_second
        return None if rate is None else self.rate.middle / rate - 1

    @property
    def rate_inside(self) -> bool | None:
        rate = self.point.tokens_per_second
        return None if rate is None else self.rate.low <= rate <= self.rate.high

    @property
    def memory_error(self) -> float | None:
        published = self.point.memory_bytes
        return None if published is None else (self.peak if self.point.memory_of == "allocated" else self.most) / published - 1

    @property
    def memory_inside(self) -> bool | None:
        """Whether the published memory is within 5 % of the peak, or in the range."""
        published = self.point.memory_bytes
        if published is None:
            return None
        if self.point.memory_of == "allocated":
            return abs(self.peak / published - 1) <= 0.05
        return self.least <= published <= self.most


def predict_point(point: PublishedPoint, cost: StepCost, published: Sequence[EfficiencyRun] | None = None) -> Prediction:
    """Predict a point's rate and memory from the cost of its step; the rate from the published runs that are given, else from all."""
    machine = hardware.find_machine(f"{point.card} x{point.cards}")
    if point.network_gbit_per_s is not None:
        machine = replace(machine, network=Network(point.network_gbit_per_s, gpudirect_rdma=True, kind=point.network_kind))
    group = MachineGroup(machine, point.machines, point.step.strategy, point.replicate_size)
    time = step_time.estimate_step_time(cost, point.step, point.batch, point.accumulation, group, published=published)
    budget = memory_budget.compute_memory_budget(cost, point.step, point.batch, group.world_size, point.replicate_size)
    roofline = step_time.compute_roofline(cost, point.step, point.batch, point.accumulation, group)
    return Prediction(
        point,
        time.total.to_rate(point.batch * point.accumulation * point.length),
        time.basis,
        time.bottleneck,
        roofline,
        max(time.intra_node.middle, time.inter_node.middle),
        budget.peak,
        budget.lower_bound,
        budget.upper_bound,
    )


def list_efficiency_runs(predictions: Sequence[Prediction]) -> list[EfficiencyRun]:
    """List the runs that tell what cards reach.

    Left out are those that links hold up, what a recipe cannot express, steps so short that they may wait for the launch of their kernels, rates that
    are lower bounds, and rates above the roofline, which show that a run was not as it is taken to be.
    """
    return [
        EfficiencyRun(p.point.source, p.point.card, _get_peak(p), classify_step(p.point.step), round(p.efficiency, 3))
        for p in predictions
        if p.efficiency is not None and tells_efficiency(p)
    ]


def leave_source_out(predictions: Sequence[Prediction], costs: Mapping[str, StepCost]) -> list[Prediction]:
    """Predict each point's rate again, as the planner would if it did not know the point's source.

    A point is left out where no other source tells of anything.

    Args:
        predictions: The points.
        costs: Their steps, by the points' names.
    """
    runs = list_efficiency_runs(predictions)
    found = []
    for point in (p.point for p in predictions if p.point.tokens_per_second is not None and p.point.beyond_plan is None):
        others = [run for run in runs if run.source != point.source]
        if others:
            found.append(predict_point(point, costs[point.name], others))
    return found


def tells_efficiency(prediction: Prediction) -> bool:
    """Return whether a published rate shows what cards reach."""
    point = prediction.point
    is_exact = point.batch * point.length >= SHORTEST_STEP and not point.is_lower_bound
    is_possible = prediction.efficiency is not None and prediction.efficiency <= 1  # else the run was not what is taken of it
    return is_possible and prediction.bottleneck == "compute" and point.beyond_plan is None and is_exact


def _get_peak(prediction: Prediction) -> float:
    return hardware.load_catalog().cards[prediction.point.card].bf16_tflops


def print_points(predictions: Iterable[Prediction]) -> None:
    """Print every point beside what the planner says of it."""
    _line(
        "point", "source", "kind", "tokens/s: planned", "published", "error", "memory GiB: planned", "published", "error", "not expressed"
    )
    _line(*["---"] * 10)
    for p in predictions:
        point = p.point
        rate = ("-", "-", "-")
        if point.tokens_per_second is not None:
            mark = "" if p.rate_inside else " outside"
            rate = (
                f"{p.rate.middle:,.0f} ({p.rate.low:,.0f}–{p.rate.high:,.0f})",
                f"{point.tokens_per_second:,.0f}",
                f"{p.rate_error:+.1%}{mark}",
            )
        memory = ("-", "-", "-")
        if point.memory_bytes is not None:
            planned = f"{p.peak / GIB:.1f}" if point.memory_of == "allocated" else f"{p.least / GIB:.1f}–{p.most / GIB:.1f}"
            memory = (planned, f"{point.memory_bytes / GIB:.1f} {point.memory_of}", f"{p.memory_error:+.1%}")
        _line(point.name, point.source, point.kind, *rate, *memory, point.beyond_plan or "")


def print_coverage(predictions: Sequence[Prediction]) -> None:
    """Print how many rates and peaks the planner's ranges hold, by kind, card and source."""
    counted = [p for p in predictions if p.point.beyond_plan is None]
    for title, key in _GROUPINGS.items():
        print(f"\n## Coverage by {title}\n")
        _line(
            title,
            "rates",
            "in the range",
            "median error",
            "median half-width",
            "peaks",
            "within 5 %, or in the range",
            "median error",
            "largest error",
        )
        _line(*["---"] * 9)
        for name, group in _group(counted, key).items():
            _line(name, *summarize_rates([(p.rate, p.point.tokens_per_second) for p in group]), *_summarize_memory(group))


def print_left_out(predictions: Sequence[Prediction], costs: Mapping[str, StepCost]) -> None:
    """Print the coverage when each source is predicted from the others."""
    counted = [p for p in predictions if p.point.beyond_plan is None and p.point.tokens_per_second is not None]
    found = leave_source_out(predictions, costs)
    for title, key in {**_GROUPINGS, "what it rests on": lambda p: _get_level(p.basis)}.items():
        print(f"\n## Leave one source out, by {title}\n")
        _line(title, "rates", "in the range", "median error", "median half-width")
        _line(*["---"] * 5)
        for name, group in _group(found, key).items():
            _line(name, *summarize_rates([(p.rate, p.point.tokens_per_second) for p in group]))
    print("\n## Leave one source out, point by point\n")
    _line("point", "kind", "tokens/s: planned", "published", "error", "rests on")
    _line(*["---"] * 6)
    for p in found:
        mark = "" if p.rate_inside else " outside"
        rate = f"{p.rate.middle:,.0f} ({p.rate.low:,.0f}–{p.rate.high:,.0f})"
        _line(p.point.name, p.point.kind, rate, f"{p.point.tokens_per_second:,.0f}", f"{p.rate_error:+.1%}{mark}", p.basis)
    print("\n## Share of the roofline that published rates reach, where links do not hold them up\n")
    _line("card", "kind", "points", "sources", "lowest", "median", "highest")
    _line(*["---"] * 7)
    for (card, kind), group in _group([p for p in counted if tells_efficiency(p)], lambda p: (p.point.card, p.point.kind)).items():
        shares = [p.efficiency or 0.0 for p in group]
        numbers = (f"{value:.2f}" for value in (min(shares), statistics.median(shares), max(shares)))
        _line(card, kind, len(group), len({p.point.source for p in group}), *numbers)


def _get_level(basis: str) -> str:
    """Return what the runs have in common with a step, from the words of a basis."""
    return basis.partition(", ")[2].partition(" (")[0]


_GROUPINGS: Mapping[str, Callable[[Prediction], str]] = {
    "kind of step": lambda p: p.point.kind,
    "card": lambda p: p.point.card,
    "source": lambda p: p.point.source,
    "all": lambda p: "all",
}


def _group(predictions: Sequence[Prediction], key: Callable[[Prediction], Any]) -> dict[Any, list[Prediction]]:
    groups: dict[Any, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(key(prediction), []).append(prediction)
    return groups


def summarize_rates(rates: Sequence[tuple[Span, float | None]]) -> tuple[str, str, str, str]:
    """Summarize ranges beside published rates: number, how many hold theirs, median error, median half-width."""
    known = [(span, rate) for span, rate in rates if rate is not None]
    if not known:
        return ("0", "-", "-", "-")
    inside = sum(span.low <= rate <= span.high for span, rate in known)
    error = statistics.median(span.middle / rate - 1 for span, rate in known)
    width = statistics.median((span.high - span.low) / 2 / span.middle for span, _ in known)
    return (str(len(known)), f"{inside} ({inside / len(known):.0%})", f"{error:+.1%}", f"± {width:.0%}")


def _summarize_memory(group: Sequence[Prediction]) -> tuple[str, str, str, str]:
    errors = [error for p in group if (error := p.memory_error) is not None]
    if not errors:
        return ("0", "-", "-", "-")
    inside = sum(bool(p.memory_inside) for p in group)
    return (str(len(errors)), f"{inside} ({inside / len(errors):.0%})", f"{statistics.median(errors):+.1%}", f"{max(errors, key=abs):+.1%}")


def _line(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")
