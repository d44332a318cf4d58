"""Families of densities p(t) that P-POTS may fit to calibrated moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.curves import Curve
from megatron_mdm.diffusion.epr import fit_epr
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import CENTRES

POLYNOMIAL_DEGREE = 7  # the paper's ablation
NUM_HISTOGRAM_BINS = 20
_LEAST_SHARE = 1e-3  # of the mean density, where a polynomial would be negative


class Density(NamedTuple):
    unnormalized: Curve  # up to its constant, at t in [0, 1]
    parameters: dict[str, float]


class FitInputs(NamedTuple):
    optimum: Curve  # √target(t), up to its constant
    points: Floats  # [b] increasing t at which a curve is fitted
    num_restarts: int
    seed: int


def epr(inputs: FitInputs) -> Density:
    """The paper's seven-parameter curve, by KL divergence. Finite at 0, where the optimum grows as t^(−1/2)."""
    fit = fit_epr(inputs.points, inputs.optimum(inputs.points), num_restarts=inputs.num_restarts, seed=inputs.seed)
    return Density(fit.curve.unnormalized, fit.curve.parameters())


def polynomial(inputs: FitInputs) -> Density:
    """Least squares of degree 7 (the paper's ablation), kept positive."""
    values = inputs.optimum(inputs.points)
    fitted = np.polynomial.Polynomial.fit(inputs.points, values, POLYNOMIAL_DEGREE, domain=[0.0, 1.0])
    least = _LEAST_SHARE * float(values.mean())
    parameters = {f"c{power}": float(c) for power, c in enumerate(fitted.convert().coef)}
    return Density(lambda t: np.maximum(fitted(t), least), parameters)


def histogram(inputs: FitInputs) -> Density:
    """Piecewise constant on 20 bins: of all such densities, the root of each bin's mean target is the optimum."""
    target = np.square(inputs.optimum(CENTRES))
    which = np.minimum((CENTRES * NUM_HISTOGRAM_BINS).astype(int), NUM_HISTOGRAM_BINS - 1)
    height = np.sqrt(np.bincount(which, target) / np.bincount(which))
    bins = [f"bin{index}" for index in range(NUM_HISTOGRAM_BINS)]
    last = NUM_HISTOGRAM_BINS - 1
    return Density(
        lambda t: height[np.minimum((t * NUM_HISTOGRAM_BINS).astype(int), last)],
        dict(zip(bins, height.tolist())),
    )


def token_moments(inputs: FitInputs) -> Density:
    """The optimum of the smoothed token moments itself, with its true shape near 0."""
    return Density(inputs.optimum, {})


DENSITIES: dict[str, Callable[[FitInputs], Density]] = {
    "epr": epr,
    "token_moments": token_moments,
    "polynomial": polynomial,
    "histogram": histogram,
}


def kl_divergence(p: Floats, q: Floats) -> float:
    """KL(p ‖ q) of two densities, positive values on one equal grid in any scale, nats."""
    p = p / p.mean()
    q = q / q.mean()
    return float((p * np.log(p / q)).mean())
