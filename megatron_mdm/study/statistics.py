"""What a few runs say of many: intervals of means, differences, spreads and correlations. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from megatron_mdm.evaluation.intervals import LEVEL, Interval, student_quantile

NUM_RESAMPLES = 4000
_NEARLY_ONE = 1.0 - 1e-12  # whose transform is finite


def contrast(groups: Sequence[Sequence[float]], coefficients: Sequence[float]) -> Interval:
    """Σ cᵢ · mean of group i, with the interval of Welch (1947) and Satterthwaite (1946): groups may have other
    variances. Two groups with coefficients 1, −1: Welch's interval of a difference."""
    estimate = float(sum(c * np.mean(group) for c, group in zip(coefficients, groups, strict=True)))
    if min(len(group) for group in groups) < 2:
        return Interval(estimate, -math.inf, math.inf)
    parts = [c**2 * float(np.var(group, ddof=1)) / len(group) for c, group in zip(coefficients, groups)]
    variance = sum(parts)
    if variance == 0.0:
        return Interval(estimate, estimate, estimate)
    freedom = variance**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups))
    half = student_quantile(freedom) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


def spread_ratio(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Standard deviation of the values over that of the others, with the F interval (both normally distributed)."""
    if min(len(values), len(others)) < 2:
        return Interval(math.nan, 0.0, math.inf)
    below = float(np.var(others, ddof=1))
    ratio = float(np.var(values, ddof=1)) / below if below else math.inf
    freedom = (len(values) - 1, len(others) - 1)
    lower, upper = (ratio / float(stats.f.ppf(p, *freedom)) for p in (0.5 + LEVEL / 2, 0.5 - LEVEL / 2))
    return Interval(math.sqrt(ratio), math.sqrt(lower), math.sqrt(upper))


def worst_over_best(
    values: Sequence[float],
    errors: Sequence[float],
    others: Sequence[float],
    other_errors: Sequence[float],
    seed: int = 0,
) -> Interval:
    """The least of the values less the greatest of the others, with the interval that their standard errors leave
    (parametric bootstrap): whether every one of these very runs is better than every other, on all questions there
    could have been."""
    generator = np.random.default_rng(seed)
    first = np.array(values) + np.array(errors) * generator.standard_normal((NUM_RESAMPLES, len(values)))
    second = np.array(others) + np.array(other_errors) * generator.standard_normal((NUM_RESAMPLES, len(others)))
    # Extremes of noisy values lie further out than those of the true ones: the basic bootstrap turns that round.
    margin = min(values) - max(others)
    resampled = first.min(1) - second.max(1)
    low, high = np.quantile(resampled, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(margin, float(2 * margin - high), float(2 * margin - low))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Spearman's ρ, with Fisher's transformation and the variance of Bonett and Wright (2000), (1 + ρ²/2)/(n − 3)."""
    return mean_rank_correlation([(x, y)])


def mean_rank_correlation(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Interval:
    """Of several independent samples: the mean of Fisher's transforms of their ρ, weighted by n − 3, turned back."""
    rhos = [float(stats.spearmanr(x, y).statistic) for x, y in pairs]
    weights = [len(x) - 3 for x, _ in pairs]
    if min(weights) < 1 or any(map(math.isnan, rhos)):
        return Interval(float(np.mean(rhos)), -1.0, 1.0)
    transforms = [math.atanh(max(-_NEARLY_ONE, min(_NEARLY_ONE, rho))) for rho in rhos]
    centre = math.fsum(w * z for w, z in zip(weights, transforms)) / sum(weights)
    variance = math.fsum(w * (1 + rho**2 / 2) for w, rho in zip(weights, rhos)) / sum(weights) ** 2
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * math.sqrt(variance)
    return Interval(math.tanh(centre), math.tanh(centre - half), math.tanh(centre + half))


def proportion_error(share: float, number: int) -> float:
    """Standard error of a share of right answers, with Agresti and Coull's two answers of each kind added, so that 0 %
    and 100 % have one, too."""
    adjusted = (share * number + 2) / (number + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (number + 4))
