"""How sure a number is: sums over units that are drawn again and again, the same draws for all that is compared.

Every interval in a result is made here; docs/metrics.md says how to read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RESAMPLES = 1_000
BLOCK = 50  # resamples worked on at a time
UNITS = 10_000  # drawn separately at most: more make no interval better, and cost memory
LEVEL = 95  # per cent of the resamples that an interval holds


class Estimate(NamedTuple):
    """A measure and what it is in each resample, [RESAMPLES]. The value is None where there is nothing to divide by."""

    value: float | None
    resamples: Floats


class Resampling:
    """How often each unit stands in each resample, the same for everything measured on a set, so that differences are paired.

    Whole groups are drawn with replacement (Efron & Tibshirani 1993, ch. 6 and 8): documents of one source resemble each other.
    More than UNITS groups are drawn in UNITS blocks, each of every UNITS-th one.
    """

    def __init__(self, groups: Sequence[str], seed: int) -> None:
        _, group = np.unique(np.array(groups, dtype=object), return_inverse=True)
        self.unit: Ints = group % UNITS  # [documents]
        self.units = int(self.unit.max()) + 1
        random = np.random.Generator(np.random.PCG64(seed))
        self.drawn = random.multinomial(self.units, np.full(self.units, 1 / self.units), RESAMPLES).astype(np.uint16)

    def of(self, value: float, resampled: Floats) -> dict[str, Any]:
        """A measure with its percentile interval; none from a single unit, or where no resample has a value."""
        if self.units < 2 or np.isnan(resampled).all():
            return {"value": rounded(value), "interval": None}
        low, high = np.nanpercentile(resampled, [50 - LEVEL / 2, 50 + LEVEL / 2])
        return {"value": rounded(value), "interval": [rounded(float(low)), rounded(float(high))]}

    def estimate(self, above: Ints | Floats, below: Ints | Floats, factor: float = 1.0) -> Estimate:
        """A quotient of two sums over documents, times a factor."""
        if below.sum() == 0:
            return Estimate(None, np.full(RESAMPLES, np.nan))
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = factor * self.sums(above) / self.sums(below)
        return Estimate(factor * float(above.sum() / below.sum()), resampled)

    def told(self, found: Estimate) -> dict[str, Any]:
        """An estimate as a result holds it."""
        return {"value": None, "interval": None} if found.value is None else self.of(found.value, found.resamples)

    def difference(self, found: Estimate, baseline: Estimate) -> dict[str, Any]:
        """How much one estimate is above another, from the same resamples of both."""
        if found.value is None or baseline.value is None:
            return {"value": None, "interval": None}
        return self.of(found.value - baseline.value, found.resamples - baseline.resamples)

    def ratio(self, above: Ints | Floats, below: Ints | Floats, factor: float = 1.0) -> dict[str, Any]:
        """`estimate`, told. The value is None where there is nothing to divide by."""
        return self.told(self.estimate(above, below, factor))

    def sums(self, counts: Ints | Floats) -> Floats:
        """The sum of counts [documents] in each resample."""
        by_unit = np.bincount(self.unit, counts, minlength=self.units)
        return np.concatenate([self.drawn[i : i + BLOCK] @ by_unit for i in range(0, RESAMPLES, BLOCK)])


def rounded(value: float) -> float:
    """Five significant digits: more than any interval here is wide."""
    return float(f"{value:.5g}")


def compared(
    resampling: Resampling, found: Mapping[str, Mapping[str, Estimate]], baseline: str
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For each model its measures, and their differences to the baseline's; the baseline itself has none of these."""
    told = {}
    for name, measures in found.items():
        values = {key: resampling.told(estimate) for key, estimate in measures.items()}
        differences = {key: resampling.difference(estimate, found[baseline][key]) for key, estimate in measures.items()}
        told[name] = values, differences if name != baseline else {}
    return told
