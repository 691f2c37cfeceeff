"""The share of a card's roofline that training reaches, by published runs.

Runs that others published (hardware/efficiencies.yaml) are grouped by chip and by kind of step. A source counts once in a group, with the
median of its runs. How wide a range is follows from how far the sources of a group lie from what the other sources tell of them. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from azrecipe.hardware import Card, load_catalog, read_shipped_file
from azrecipe.planning.simulation.step_spec import StepSpec

COVERAGE = 0.9  # share of the sources that a range shall hold
NO_SOURCES_SPREAD = 2.0  # factor, where no two sources show how far they differ
OWN_RUNS_SPREAD = 0.1  # relative spread of runs on the user's machines


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


class StepKind(NamedTuple):
    """What decides a step's efficiency besides its card.

    method: full, lora, qlora. execution: eager, fused (Liger's kernels in the layers), compiled.
    """

    method: str
    execution: str


def classify_step(step: StepSpec) -> StepKind:
    """Return the kind of a step."""
    method = "qlora" if step.quantized else "lora" if step.lora is not None else "full"
    return StepKind(method, "compiled" if step.torch_compile else "fused" if step.kernels else "eager")


@dataclass(frozen=True)
class EfficiencyRun:
    """A published run.

    peak: TFLOPS of its chip. efficiency: the share of the roofline that it reached.
    """

    source: str
    card: str
    peak: float
    kind: StepKind
    efficiency: float


class Efficiency(NamedTuple):
    """The share of the roofline that training reaches, and its basis.

    has_card: whether a run on such a card is known.
    """

    share: Span
    basis: str
    has_card: bool = True


class _Level(NamedTuple):
    """What runs have in common with a step that they tell of."""

    title: str
    matches: Callable[[EfficiencyRun, float, StepKind], bool]


def _is_same_method(run: EfficiencyRun, kind: StepKind) -> bool:
    return run.kind.method == kind.method and run.kind != kind


# Nearest first. Cards of one peak are one chip, with more or less memory. No run is of two levels: how far a level's runs lie from a step is
# measured without what a nearer level has
_LEVELS = (
    _Level("such steps on this chip", lambda run, peak, kind: run.peak == peak and run.kind == kind),
    _Level("steps of this method on this chip", lambda run, peak, kind: run.peak == peak and _is_same_method(run, kind)),
    _Level("other steps on this chip", lambda run, peak, kind: run.peak == peak and run.kind.method != kind.method),
    _Level("such steps on other chips", lambda run, peak, kind: run.peak != peak and run.kind == kind),
    _Level("steps on other chips", lambda run, peak, kind: run.peak != peak and run.kind != kind),
)


def estimate_efficiency(
    card: Card, kind: StepKind, user_loops: Sequence[Mapping[str, Any]] = (), published: Sequence[EfficiencyRun] | None = None
) -> Efficiency:
    """Estimate the share of the roofline that steps reach on a card.

    Args:
        card: The card. The user's own shares the runs of a chip with its peak.
        kind: The kind of step.
        user_loops: Calibrated loops of the user. Where some ran on this card, they count alone.
        published: The published runs; None: those of hardware/efficiencies.yaml.
    """
    calibrated = [float(loop["efficiency"]) for loop in user_loops if loop["card"] == card.name]
    if calibrated:
        middle = statistics.median(calibrated)
        low, high = min(*calibrated, middle * (1 - OWN_RUNS_SPREAD)), min(max(*calibrated, middle * (1 + OWN_RUNS_SPREAD)), 1.0)
        plural = "s" if len(calibrated) > 1 else ""
        return Efficiency(Span(low, middle, high), f"{len(calibrated)} training loop{plural} of your own on {card.name}")
    runs = load_efficiency_runs() if published is None else published
    level = next(level for level in _LEVELS if any(level.matches(run, card.bf16_tflops, kind) for run in runs))
    chosen = [run for run in runs if level.matches(run, card.bf16_tflops, kind)]
    middle, spread = _find_middle(chosen), _measure_spread(level, runs)
    sources, names = len({run.source for run in chosen}), ", ".join(sorted({run.card for run in chosen}))
    count = f"{len(chosen)} published run{'s' if len(chosen) > 1 else ''} of {sources} source{'s' if sources > 1 else ''}"
    has_card = any(run.peak == card.bf16_tflops for run in runs)
    basis = f"{count}, {level.title} ({names})" + ("" if has_card else f": none on {card.name} is known")
    return Efficiency(Span(middle / spread, middle, middle * spread), basis, has_card)


def _find_middle(runs: Sequence[EfficiencyRun]) -> float:
    """Find the median of the sources' medians."""
    by_source: dict[str, list[float]] = {}
    for run in runs:
        by_source.setdefault(run.source, []).append(run.efficiency)
    return statistics.median(statistics.median(values) for values in by_source.values())


def _measure_spread(level: _Level, runs: Sequence[EfficiencyRun]) -> float:
    """Measure how far runs lie from what other sources tell.

    Returns a factor, which COVERAGE of the known runs do not exceed. Each source counts alike, however many runs it has.
    """
    errors = []
    for source in {run.source for run in runs}:
        others = [run for run in runs if run.source != source]
        of_source = []
        for run in (run for run in runs if run.source == source):
            matching = [other for other in others if level.matches(other, run.peak, run.kind)]
            if matching:
                of_source.append(abs(math.log(run.efficiency / _find_middle(matching))))
        errors += [(error, 1 / len(of_source)) for error in of_source]
    if not errors:
        return NO_SOURCES_SPREAD
    reached, total = 0.0, sum(weight for _, weight in errors)
    for error, weight in sorted(errors):
        reached += weight
        if reached >= COVERAGE * total * (1 - 1e-9):
            return math.exp(error)
    raise AssertionError("weights sum to their total")


@cache
def load_efficiency_runs() -> tuple[EfficiencyRun, ...]:
    """Load the runs in hardware/efficiencies.yaml."""
    cards = load_catalog().cards
    return tuple(
        EfficiencyRun(
            run["source"], run["card"], cards[run["card"]].bf16_tflops, StepKind(run["method"], run["execution"]), run["efficiency"]
        )
        for run in read_shipped_file("efficiencies.yaml").to_plain()["runs"]
    )
