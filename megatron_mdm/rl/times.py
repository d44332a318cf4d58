"""Quantiles u of the mask rates of a rollout's updates, t = F⁻¹(u), by `rl.times`.

Each rule gives u [μ, units] in [0, 1] of a minibatch: of every update n and unit, a group of completions that share
their rate (or, with share_noise none, a completion).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats

NUM_PAPER_STEPS = 1000  # T of UniGRPO's discrete times

QuantileRule = Callable[[np.random.Generator, int, int], Floats]  # (generator, units, μ) → u [μ, units]


def stratified(generator: np.random.Generator, num_units: int, num_iterations: int) -> Floats:
    """u[n, g] = frac((π(g) + U_g)/B + n/μ), π a random permutation of the B units: every update is stratified over its
    units, every unit's updates are evenly spaced, and each u is uniform.

    In no order: sorted rates would give each update rates of its own, the first, at ratio 1, always the lowest. Its
    gradient would be that of a part of the objective, and only the sum of all μ, at one θ, that of the whole.
    """
    start = (generator.permutation(num_units) + generator.random(num_units)) / num_units
    return (start + np.arange(num_iterations)[:, None] / num_iterations) % 1.0


def systematic(generator: np.random.Generator, num_units: int, num_iterations: int) -> Floats:
    """(n + u)/μ, one u for all units: the example of UniGRPO's text (Yang et al. 2025, Section 3.3)."""
    u = (np.arange(num_iterations) + generator.random()) / num_iterations
    return np.repeat(u[:, None], num_units, axis=1)


def paper(generator: np.random.Generator, num_units: int, num_iterations: int) -> Floats:
    """UniGRPO's formula as printed (arXiv 2505.15809, Algorithm 1), n = 1 … μ: t_1 = ⌊r T⌋, r uniform,
    t_n = ⌊(n − 1)/(μ − 1) (T − t_1) + t_1⌋. The last update masks everything; the mean is above 1/2."""
    first = np.floor(generator.random(num_units) * NUM_PAPER_STEPS)
    share = np.arange(num_iterations)[:, None] / max(num_iterations - 1, 1)
    return np.floor(share * (NUM_PAPER_STEPS - first) + first) / NUM_PAPER_STEPS


def iid_sorted(generator: np.random.Generator, num_units: int, num_iterations: int) -> Floats:
    """Independent draws of each unit, in ascending order (arXiv 2511.18159, Appendix A.9)."""
    return np.sort(generator.random((num_iterations, num_units)), axis=0)


QUANTILES: dict[str, QuantileRule] = {  # by rl.times
    "stratified": stratified,
    "systematic": systematic,
    "paper": paper,
    "iid_sorted": iid_sorted,
}


class Quadrature(NamedTuple):
    """mean(weights · f(nodes)) ≈ ∫ f(t) dt."""

    nodes: Floats  # [number] in (0, 1)
    weights: Floats  # [number], of mean 1


def gauss_legendre(number: int) -> Quadrature:
    """Exact for polynomials of degree 2 · number − 1 (GDPO, arXiv 2510.08554)."""
    nodes, weights = np.polynomial.legendre.leggauss(number)
    return Quadrature((nodes + 1.0) / 2.0, weights * number / 2.0)
