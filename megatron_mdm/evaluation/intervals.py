"""Intervals of measured shares, and of means over runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
WILSON_Z = 1.96  # 95 %


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    share = right / total
    z2 = WILSON_Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = WILSON_Z / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


class Interval(NamedTuple):
    """An estimate with its 95 % interval; bounds are infinite where the runs are too few to give any."""

    estimate: float
    lower: float
    upper: float

    @property
    def half_width(self) -> float:
        return (self.upper - self.lower) / 2

    def apart_from(self, other: Interval) -> bool:
        """Whether the two intervals do not overlap."""
        return self.lower > other.upper or self.upper < other.lower


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean that the values are drawn around."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = student_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def student_quantile(freedom: float) -> float:
    """Half the width of a 95 % interval of Student's t, in standard errors."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
