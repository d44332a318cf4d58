"""A smooth positive curve through noisy ratios, as stiff as the data are few, and how well it is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import Rates

# Standard deviations of the prior of log rate: of a slope in t and in log t, without a leader and with one, and of the
# power of the leader beyond the expected one.
_ALONE = (0.7, 0.5)
_LED = (0.1, 0.05, 0.35)
_LEVEL = 100.0
# Bumps in √t on top of these: their common standard deviation is what the losses make likely of these four, which have
# these prior weights.
_BUMPS = ((0.02, 1.0), (0.1, 0.3), (0.3, 0.1), (0.8, 0.03))
_CENTRES = np.linspace(0.0, 1.0, 11)
_WIDTH = 0.13
_NEAR_ZERO = 0.02  # log t turns flat there
_NEIGHBOURHOOD = 0.1  # in √t: over which the noise of cells is pooled
_PRIOR_EVENTS = 5.0  # with which a neighbourhood's noise is shrunk to the whole range's
_NUM_PASSES = 2
_MAX_ITERATIONS = 50
_LARGEST_EXPONENT = 30.0
_LARGEST_STEP = 3.0


class LogRate(NamedTuple):
    """A fitted log rate and its variance at t [T]."""

    mode: Floats
    variance: Floats


def log_rate(rates: Rates, t: Floats, leader: Callable[[Floats], Floats] | None = None, power: float = 0.0) -> LogRate:
    """log rate(t) [T] with amounts ≈ exposures · rate: power · leader(t), a logarithm, plus level, slopes and bumps.

    Penalised quasi-Poisson regression with a dispersion that varies over t: a cell's amounts have the variance
    φ(t) · mean, φ estimated from the groups' residuals in its neighbourhood (`_dispersion`). Where losses are small
    but of like size (an easy end of t), φ is small, too, and they count; where they are few and large (rare mistakes),
    each counts as one event, and a stretch without any is no proof that there are none. How far the curve may bend is
    what makes the losses most likely (Laplace's approximation), averaged over a few choices. Logarithms keep the rate
    positive down to t = 0.
    """
    cells = _features(rates.t, leader)
    grid = _features(t, leader)
    offset, grid_offset = (np.zeros_like(x) if leader is None else power * leader(x) for x in (rates.t, t))
    level = np.log(rates.amounts.sum() / (rates.exposures * np.exp(offset)).sum())
    offset = offset + level
    grid_offset = grid_offset + level
    fitted = offset
    beta = np.zeros(1 + cells.shape[1])
    for _ in range(_NUM_PASSES):
        mean = rates.exposures * np.exp(fitted)
        dispersion = _dispersion(rates, np.exp(fitted))
        centre = (mean / dispersion) @ cells / (mean / dispersion).sum()
        design, grid_design = (np.column_stack([np.ones(len(x)), x - centre]) for x in (cells, grid))
        problem = _Problem(
            design,
            rates.amounts / dispersion,
            rates.exposures * np.exp(offset) / dispersion,
            np.array([_LEVEL, *(_ALONE if leader is None else _LED)]),
        )
        solutions = [problem.solve(deviation, beta) for deviation, _ in _BUMPS]
        evidence = np.array([solution.evidence + np.log(prior) for solution, (_, prior) in zip(solutions, _BUMPS)])
        share = np.exp(evidence - evidence.max())
        share /= share.sum()
        beta = share @ np.array([solution.beta for solution in solutions])
        fitted = offset + design @ beta
    variances = [
        np.einsum("ij,ij->i", grid_design, np.linalg.solve(solution.curvature, grid_design.T).T)
        + np.square(grid_design @ (solution.beta - beta))
        for solution in solutions
    ]
    return LogRate(grid_offset + grid_design @ beta, share @ np.array(variances))


def _features(t: Floats, leader: Callable[[Floats], Floats] | None) -> Floats:
    """The regression's columns at t, [T, 2 or 3 + bumps]."""
    slopes = [t - 0.5, np.log(t + _NEAR_ZERO), *([] if leader is None else [leader(t)])]
    bumps = np.exp(-0.5 * np.square((np.sqrt(t)[:, None] - _CENTRES[None, :]) / _WIDTH))
    return np.column_stack([*slopes, bumps])


def _dispersion(rates: Rates, rate: Floats) -> Floats:
    """Variance over mean of the amounts [N]: squared residuals of the groups over their means, in each cell's
    neighbourhood, drawn towards the whole range's where few events were seen."""
    noise = rates.amount_squares - 2.0 * rate * rates.products + rate**2 * rates.exposure_squares
    noise = np.maximum(noise, 0.0) + 1e-12 * rates.amount_squares.mean()
    mean = rate * rates.exposures
    roots = np.sqrt(rates.t)
    kernel = np.exp(-0.5 * np.square((roots[:, None] - roots[None, :]) / _NEIGHBOURHOOD))
    num_events = np.square(kernel @ rates.amounts) / np.maximum(kernel @ rates.amount_squares, 1e-300)
    here = np.log((kernel @ noise) / (kernel @ mean))
    everywhere = np.log(noise.sum() / mean.sum())
    return np.exp((num_events * here + _PRIOR_EVENTS * everywhere) / (num_events + _PRIOR_EVENTS))


class _Solution(NamedTuple):
    beta: Floats
    curvature: Floats  # of the penalised deviance at beta
    evidence: float  # log marginal likelihood, up to a constant


class _Problem(NamedTuple):
    """Events [N] ≈ expected [N] · exp(design · β), β normal around 0."""

    design: Floats
    events: Floats
    expected: Floats
    deviations: Floats  # of β, but for the bumps

    def solve(self, bump: float, start: Floats) -> _Solution:
        """Newton with step halving on a convex objective; bump: standard deviation of the bumps."""
        deviations = np.concatenate([self.deviations, np.full(len(_CENTRES), bump)])
        penalty = np.diag(deviations**-2.0)
        beta = start
        value = self._objective(start, penalty)
        for _ in range(_MAX_ITERATIONS):
            mean = self._mean(beta)
            gradient = self.design.T @ (self.events - mean) - penalty @ beta
            step = np.linalg.solve(self._curvature(mean, penalty), gradient)
            step *= min(1.0, _LARGEST_STEP / max(np.abs(step).max(), 1e-300))
            new = self._objective(beta + step, penalty)
            while new > value and np.abs(step).max() > 1e-10:
                step = step / 2.0
                new = self._objective(beta + step, penalty)
            beta = beta + step
            value = new
            if np.abs(step).max() < 1e-8:
                break
        curvature = self._curvature(self._mean(beta), penalty)
        evidence = -value - 0.5 * np.linalg.slogdet(curvature)[1] - np.log(deviations).sum()
        return _Solution(beta, curvature, float(evidence))

    def _mean(self, beta: Floats) -> Floats:
        return self.expected * np.exp(np.minimum(self.design @ beta, _LARGEST_EXPONENT))

    def _curvature(self, mean: Floats, penalty: Floats) -> Floats:
        return (self.design.T * mean) @ self.design + penalty

    def _objective(self, beta: Floats, penalty: Floats) -> float:
        return float(self._mean(beta).sum() - self.events @ (self.design @ beta) + 0.5 * beta @ penalty @ beta)
