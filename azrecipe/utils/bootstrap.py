"""Bootstrap intervals for measures over documents.

Every interval in a result is computed here. docs/metrics.md says how to read it. All measures on one set use the same
resamples, so that differences between models are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NUM_RESAMPLES = 1_000
RESAMPLES_PER_BLOCK = 50  # resamples that are computed at a time
MAX_UNITS = 10_000  # more units improve no interval and cost memory
CONFIDENCE_LEVEL = 95  # per cent of the resamples that an interval contains


class BootstrapEstimate(NamedTuple):
    """A measure and its value in each resample.

    `value` is None where the denominator is zero.
    """

    value: float | None
    resamples: FloatArray  # one value a resample


class Resampling:
    """The resamples of one set of documents.

    Whole groups are drawn with replacement (Efron & Tibshirani 1993, ch. 6 and 8), as documents of one source resemble
    each other. A set with too many groups is drawn in a fixed number of blocks instead.
    """

    def __init__(self, groups: Sequence[str], seed: int) -> None:
        """Draw the resamples; `groups` names the group of each document."""
        _, group_indices = np.unique(np.array(groups, dtype=object), return_inverse=True)
        self.document_units: IntArray = group_indices % MAX_UNITS  # [documents]
        self.num_units = int(self.document_units.max()) + 1
        generator = np.random.Generator(np.random.PCG64(seed))
        # [resamples, units]: how often each unit is in each resample
        self.draw_counts = generator.multinomial(self.num_units, np.full(self.num_units, 1 / self.num_units), NUM_RESAMPLES).astype(
            np.uint16
        )

    def summarize_value(self, value: float, resampled: FloatArray) -> dict[str, Any]:
        """Return a measure with its percentile interval.

        The interval is None for a single unit, or where no resample has a value.
        """
        if self.num_units < 2 or np.isnan(resampled).all():
            return {"value": round_significant(value), "interval": None}
        low, high = np.nanpercentile(resampled, [50 - CONFIDENCE_LEVEL / 2, 50 + CONFIDENCE_LEVEL / 2])
        return {"value": round_significant(value), "interval": [round_significant(float(low)), round_significant(float(high))]}

    def estimate_ratio(
        self, numerators: IntArray | FloatArray, denominators: IntArray | FloatArray, factor: float = 1.0
    ) -> BootstrapEstimate:
        """Return a quotient of two sums over documents, times a factor.

        Args:
            numerators: One value a document, [documents].
            denominators: One value a document, [documents].
            factor: Multiplies the quotient.
        """
        if denominators.sum() == 0:
            return BootstrapEstimate(None, np.full(NUM_RESAMPLES, np.nan))
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = factor * self.sum_by_resample(numerators) / self.sum_by_resample(denominators)
        return BootstrapEstimate(factor * float(numerators.sum() / denominators.sum()), resampled)

    def summarize(self, estimate: BootstrapEstimate) -> dict[str, Any]:
        """Return an estimate in the form of result.json."""
        return {"value": None, "interval": None} if estimate.value is None else self.summarize_value(estimate.value, estimate.resamples)

    def summarize_difference(self, estimate: BootstrapEstimate, baseline: BootstrapEstimate) -> dict[str, Any]:
        """Return an estimate minus the baseline's, with a paired interval."""
        if estimate.value is None or baseline.value is None:
            return {"value": None, "interval": None}
        return self.summarize_value(estimate.value - baseline.value, estimate.resamples - baseline.resamples)

    def summarize_ratio(
        self, numerators: IntArray | FloatArray, denominators: IntArray | FloatArray, factor: float = 1.0
    ) -> dict[str, Any]:
        """Return a quotient of two sums in the form of result.json.

        Args:
            numerators: One value a document, [documents].
            denominators: One value a document, [documents].
            factor: Multiplies the quotient.
        """
        return self.summarize(self.estimate_ratio(numerators, denominators, factor))

    def sum_by_resample(self, counts: IntArray | FloatArray) -> FloatArray:
        """Return the sum of counts [documents] in each resample."""
        by_unit = np.bincount(self.document_units, counts, minlength=self.num_units)
        return np.concatenate(
            [self.draw_counts[i : i + RESAMPLES_PER_BLOCK] @ by_unit for i in range(0, NUM_RESAMPLES, RESAMPLES_PER_BLOCK)]
        )


def round_significant(value: float) -> float:
    """Round to five significant digits, which exceeds every interval's precision."""
    return float(f"{value:.5g}")


class ComparedMeasures(NamedTuple):
    """A model's measures, and their differences to the baseline's."""

    values: dict[str, Any]
    differences: dict[str, Any]


def compare_to_baseline(
    resampling: Resampling, estimates: Mapping[str, Mapping[str, BootstrapEstimate]], baseline: str
) -> dict[str, ComparedMeasures]:
    """Return each model's measures and their differences to the baseline.

    The baseline itself has no differences.
    """
    comparison = {}
    for name, measures in estimates.items():
        values = {key: resampling.summarize(estimate) for key, estimate in measures.items()}
        differences = {key: resampling.summarize_difference(estimate, estimates[baseline][key]) for key, estimate in measures.items()}
        comparison[name] = ComparedMeasures(values, differences if name != baseline else {})
    return comparison
