"""Samplers of the mask rate t, as quantile functions: t = F⁻¹(u), so that stratifying u composes with all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.randomness import Purpose, stream

NUM_CELLS = 4096  # of the tabulated density
CENTRES: Floats = (np.arange(NUM_CELLS) + 0.5) / NUM_CELLS


class TSampler(Protocol):
    """A density p(t) > 0 on [0, 1]."""

    def quantile(self, u: Floats) -> tuple[Floats, Floats]:
        """u in [0, 1) → (t, importance weight 1/p(t)), both float64 and of u's shape."""
        ...

    def density(self, t: Floats) -> Floats: ...

    def weighted_mass(self, num_bins: int) -> Floats:
        """E[w 1(t in bin)] of equal bins of [0, 1], [num_bins]: for f constant in bins, E[w f(t)] = Σ mass · f."""
        ...


class UniformSampler:
    """t ~ U[0, 1]: standard training."""

    def quantile(self, u: Floats) -> tuple[Floats, Floats]:
        return u, np.ones_like(u)

    def density(self, t: Floats) -> Floats:
        return np.ones_like(t)

    def weighted_mass(self, num_bins: int) -> Floats:
        return np.full(num_bins, 1.0 / num_bins)


class TabulatedSampler:
    """A density that is constant on each of N equal cells of [0, 1].

    The weight comes from the table that is sampled, so the estimator is unbiased to floating-point accuracy whatever
    the table holds, and the whole of [0, 1] can be reached.
    """

    def __init__(self, cell_density: Floats) -> None:
        """cell_density [N]: positive, in any scale."""
        density = np.asarray(cell_density, dtype=np.float64)
        if density.ndim != 1 or not np.isfinite(density).all() or (density <= 0).any():
            raise ValueError("a tabulated density must be one-dimensional, finite and positive")
        mean = density.mean()
        # What is normalised already stays as it is, to the last bit: a resumed run draws the same t.
        self.cell_density = density if abs(mean - 1.0) < 1e-12 else density / mean
        self.cumulative = np.concatenate([[0.0], np.cumsum(self.cell_density) / len(density)])
        self.cumulative[-1] = 1.0

    @classmethod
    def of(cls, density: Callable[[Floats], Floats], uniform_floor: float) -> TabulatedSampler:
        """Tabulate density(t) at the cells' centres, mixed with the uniform: p ← (1 − λ) p + λ, so that 1/p ≤ 1/λ."""
        values = density(CENTRES)
        return cls((1.0 - uniform_floor) * values / values.mean() + uniform_floor)

    def quantile(self, u: Floats) -> tuple[Floats, Floats]:
        num_cells = len(self.cell_density)
        cell = np.clip(np.searchsorted(self.cumulative, u, side="right") - 1, 0, num_cells - 1)
        density = self.cell_density[cell]
        inside = np.clip((u - self.cumulative[cell]) / density * num_cells, 0.0, 1.0)
        return (cell + inside) / num_cells, 1.0 / density

    def density(self, t: Floats) -> Floats:
        num_cells = len(self.cell_density)
        return self.cell_density[np.minimum((np.asarray(t) * num_cells).astype(np.int64), num_cells - 1)]

    def weighted_mass(self, num_bins: int) -> Floats:
        return np.full(num_bins, 1.0 / num_bins)  # w p(t) = 1 everywhere


class ClippedSampler:
    """t ~ U[β, ω] without a weight (Arriola et al. 2025). Biased: nothing is ever trained outside [β, ω]."""

    def __init__(self, bounds: tuple[float, float]) -> None:
        self.lower, self.upper = bounds

    def quantile(self, u: Floats) -> tuple[Floats, Floats]:
        return self.lower + (self.upper - self.lower) * u, np.ones_like(u)

    def density(self, t: Floats) -> Floats:
        inside = (t >= self.lower) & (t <= self.upper)
        return np.where(inside, 1.0 / (self.upper - self.lower), 0.0)

    def weighted_mass(self, num_bins: int) -> Floats:
        edges = np.clip(np.linspace(0.0, 1.0, num_bins + 1), self.lower, self.upper)
        return np.diff(edges) / (self.upper - self.lower)


FULL_RANGE = (1e-3, 1.0)  # where an adaptive clipped schedule begins


def clipping_candidates() -> list[tuple[float, float]]:
    """The adaptive schedule's intervals: (almost) everything, and widths 0.5 … 0.9 at lower ends 0, 0.05, …"""
    widths = (0.5, 0.6, 0.7, 0.8, 0.9)
    steps = [(step / 20, width) for width in widths for step in range(round((1.0 - width) * 20) + 1)]
    return [FULL_RANGE, *((max(low, FULL_RANGE[0]), low + width) for low, width in steps)]


def least_variance_interval(t: Floats, loss: Floats) -> tuple[float, float]:
    """The candidate whose losses [n], at uniform t [n], vary least (the adaptive clipped schedule)."""

    def variance(bounds: tuple[float, float]) -> float:
        inside = loss[(t >= bounds[0]) & (t <= bounds[1])]
        return float(inside.var(ddof=1)) if len(inside) > 1 else np.inf

    return min(clipping_candidates(), key=variance)


class SamplerInputs(NamedTuple):
    """What a run knows when it builds its sampler."""

    cell_density: Floats  # of the calibration; empty where there is none
    clipping: tuple[float, float] = FULL_RANGE


T_SAMPLERS: dict[str, Callable[[SamplerInputs], TSampler]] = {
    "uniform": lambda _: UniformSampler(),
    "ppots": lambda inputs: TabulatedSampler(_calibrated(inputs.cell_density)),
    "clipped": lambda inputs: ClippedSampler(inputs.clipping),
}
CALIBRATED_SAMPLERS = {"ppots"}


def _calibrated(cell_density: Floats) -> Floats:
    if not len(cell_density):
        raise UserError("'diffusion.t_sampler' ppots needs a calibration")
    return cell_density


def number_of_strata(rule: int | str, global_size: int) -> int:
    """K of StraTS: the paper's √n (6 at n = 32), n itself, a number, or 1 for none."""
    if isinstance(rule, int):
        return rule
    return {"none": 1, "sqrt": max(1, round(global_size**0.5)), "full": global_size}[rule]


def stratified_quantiles(seed: int, step: int, global_size: int, num_strata: int) -> Floats:
    """The global batch's quantiles u [n] in [0, 1) for one optimizer step (StraTS, paper Section 4.3).

    ⌊n/K⌋ draws in each of K equal strata, the leftovers in distinct random strata, assigned to the batch's positions
    by a random permutation. Each u is marginally uniform; a pure function of (seed, step).
    """
    generator = stream(seed, Purpose.TIMES, step)
    strata = np.tile(np.arange(num_strata), global_size // num_strata)
    leftovers = generator.permutation(num_strata)[: global_size - len(strata)]
    strata = generator.permutation(np.concatenate([strata, leftovers]))
    u = (strata + generator.random(global_size)) / num_strata
    return np.minimum(u, np.nextafter(1.0, 0.0))
