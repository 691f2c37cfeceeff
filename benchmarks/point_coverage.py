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
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.step_time import MachineGroup, Span

LEAST_SPREAD = 0.1  # relative half-width of a range, as in step_time


@dataclass(frozen=True)
class Prediction:
    """A point beside what the planner says of it.

    roofline, links: seconds of an optimizer step at the cards' peaks, and of the slower link. rate: tokens a second of one card.
    """

    point: PublishedPoint
    rate: Span
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


def predict_point(point: PublishedPoint, cost: StepCost) -> Prediction:
    """Predict a point's rate and memory from the cost of its step."""
    machine = hardware.find_machine(f"{point.card} x{point.cards}")
    if point.network_gbit_per_s is not None:
        machine = replace(machine, network=Network(point.network_gbit_per_s, gpudirect_rdma=True))
    group = MachineGroup(machine, point.machines, point.step.strategy, point.replicate_size)
    time = step_time.estimate_step_time(cost, point.step, point.batch, point.accumulation, group)
    budget = memory_budget.compute_memory_budget(cost, point.step, point.batch, group.world_size, point.replicate_size)
    roofline = step_time.compute_roofline(cost, point.step, point.batch, point.accumulation, group)
    return Prediction(
        point,
        time.total.to_rate(point.batch * point.accumulation * point.length),
        time.bottleneck,
        roofline,
        max(time.intra_node, time.inter_node.middle),
        budget.peak,
        budget.lower_bound,
        budget.upper_bound,
    )


def leave_source_out(predictions: Sequence[Prediction]) -> dict[str, tuple[Span, str]]:
    """Predict each rate from points of other sources alone.

    A rate rests on points of the same chip and kind of step, else of the same chip and method, else of the same chip; a step's time is the
    longer of its cards' and its links'. The range is that of those points, at least ± 10 %. A point without any such is left out.
    """
    found = {}
    for prediction in predictions:
        others = [other for other in predictions if other.point.source != prediction.point.source and _tells_efficiency(other)]
        chip = [other for other in others if _get_peak(other) == _get_peak(prediction)]
        for basis, same in (
            ("chip, method, execution", [other for other in chip if other.point.kind == prediction.point.kind]),
            ("chip, method", [other for other in chip if other.point.method == prediction.point.method]),
            ("chip", chip),
        ):
            if same:
                found[prediction.point.name] = (_compute_rate(prediction, [other.efficiency or 0.0 for other in same]), basis)
                break
    return found


def _tells_efficiency(prediction: Prediction) -> bool:
    """Whether a published rate shows what cards reach: links do not hold it up."""
    return prediction.efficiency is not None and prediction.bottleneck == "compute" and prediction.point.beyond_plan is None


def _get_peak(prediction: Prediction) -> float:
    return hardware.load_catalog().cards[prediction.point.card].bf16_tflops


def _compute_rate(prediction: Prediction, shares: Sequence[float]) -> Span:
    middle = statistics.median(shares)
    low, high = min(*shares, middle * (1 - LEAST_SPREAD)), max(*shares, middle * (1 + LEAST_SPREAD))
    seconds = Span(*(max(prediction.roofline / share, prediction.links) for share in (high, middle, low)))
    return seconds.to_rate(prediction.tokens)


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


def print_left_out(predictions: Sequence[Prediction]) -> None:
    """Print the coverage when each source is predicted from the others."""
    counted = [p for p in predictions if p.point.beyond_plan is None and p.point.tokens_per_second is not None]
    found = leave_source_out(predictions)
    for title, key in _GROUPINGS.items():
        print(f"\n## Leave one source out, by {title}: the efficiency of the chip and the kind of step, from the other sources\n")
        _line(title, "rates", "in the range", "median error", "median half-width", "no other source")
        _line(*["---"] * 6)
        for name, group in _group(counted, key).items():
            known = [(found[p.point.name][0], p.point.tokens_per_second) for p in group if p.point.name in found]
            _line(name, *summarize_rates(known), len(group) - len(known))
    print("\n## Share of the roofline that published rates reach, where links do not hold them up\n")
    _line("card", "kind", "points", "sources", "lowest", "median", "highest")
    _line(*["---"] * 7)
    for (card, kind), group in _group([p for p in counted if _tells_efficiency(p)], lambda p: (p.point.card, p.point.kind)).items():
        shares = [p.efficiency or 0.0 for p in group]
        numbers = (f"{value:.2f}" for value in (min(shares), statistics.median(shares), max(shares)))
        _line(card, kind, len(group), len({p.point.source for p in group}), *numbers)


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
