"""A smooth positive curve through noisy ratios, as stiff as the data are few."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats

# Standard deviations of the prior: of a slope in t, of the power of the expected shape beyond 1, and of bumps of width
# 0.1 on top of both.
_SLOPE, _POWER, _BUMP = 3.0, 1.5, 0.25
_WIDTH = 0.1
_CENTRES = np.linspace(0.0, 1.0, 11)
_DEVIATIONS = np.array([_SLOPE, _POWER, *[_BUMP] * len(_CENTRES)])
_MAX_ITERATIONS, _LARGEST_EXPONENT = 50, 30.0


def log_linear_rate(
    cells: Floats, amounts: Floats, exposures: Floats, num_events: float, t: Floats, shape: Callable[[Floats], Floats]
) -> Floats:
    """amounts ≈ exposures · rate(cells) → rate(t) [T], with log rate = level + (1 + power) log shape + slope and bumps
    of t.

    cells, amounts, exposures [N]: non-negative sums in cells of t. shape: what the rate is taken for, up to its level,
    where the data say nothing. Penalised quasi-Poisson regression: the amounts count as `num_events` events in all,
    (Σa)²/Σa² over the groups they come from, so that a few large losses move the level but bend the curve only as far
    as a Gaussian prior on log rate allows, while many determine its shape. Logarithms keep it positive down to t = 0,
    where a straight line through few points would be cut off at nothing.
    """
    exposures = exposures * shape(cells)
    total = amounts.sum()
    scaled_exposures, scaled_amounts = exposures * (num_events / exposures.sum()), amounts * (num_events / total)
    centre = scaled_exposures @ _features(cells, shape) / num_events
    design = np.column_stack([np.ones_like(cells), _features(cells, shape) - centre])
    penalty = np.diag([1e-9, *_DEVIATIONS**-2.0])
    linear = design.T @ scaled_amounts

    def objective(beta: Floats) -> float:
        mean = scaled_exposures * np.exp(np.minimum(design @ beta, _LARGEST_EXPONENT))
        return float(mean.sum() - linear @ beta + 0.5 * beta @ penalty @ beta)

    beta = np.zeros(design.shape[1])
    for _ in range(_MAX_ITERATIONS):  # Newton with step halving on a convex objective
        mean = scaled_exposures * np.exp(np.minimum(design @ beta, _LARGEST_EXPONENT))
        gradient = linear - design.T @ mean - penalty @ beta
        step = np.linalg.solve((design * mean[:, None]).T @ design + penalty, gradient)
        size, present = 1.0, objective(beta)
        while objective(beta + size * step) > present and size > 1e-6:
            size /= 2.0
        beta = beta + size * step
        if np.abs(size * step).max() < 1e-8:
            break
    exponent = np.column_stack([np.ones_like(t), _features(t, shape) - centre]) @ beta
    return shape(t) * total / exposures.sum() * np.exp(np.minimum(exponent, _LARGEST_EXPONENT))


def _features(t: Floats, shape: Callable[[Floats], Floats]) -> Floats:
    """[T, 13]"""
    bumps = np.exp(-0.5 * np.square((t[:, None] - _CENTRES[None, :]) / _WIDTH))
    return np.column_stack([t - 0.5, np.log(shape(t)), bumps])
