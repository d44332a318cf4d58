"""From moments to the density of t that training samples, with its efficiency and a floor that does no harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.densities import DENSITIES, Density, FitInputs, kl_divergence
from megatron_mdm.diffusion.exposure import Exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import MOMENT_ESTIMATORS, Curve, MomentCurves, MomentSums
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler, TSampler

FLOORS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # candidates for λ
NUM_RESAMPLES = 100
LOWER_QUANTILE = 0.05  # of the bootstrap's efficiencies
_LEAST_TARGET = 1e-6  # of the mean target: where no loss was seen, t must still be reachable


@dataclass(frozen=True)
class Efficiency:
    """Variances of w·l under one curve E[l² | t]; for the gradient, second moments, as its mean is unknown."""

    minimal_variance: float  # (∫ sqrt(E[l²|t]) dt)² − L², no sampler of t has less
    sampler_variance: float  # ∫ E[l²|t]/p(t) dt − L²
    uniform_variance: float  # ∫ E[l²|t] dt − L²

    @property
    def of_sampler(self) -> float:
        return self.minimal_variance / self.sampler_variance

    @property
    def of_uniform(self) -> float:
        return self.minimal_variance / self.uniform_variance


def efficiency(second_moment: Curve, mean: float, sampler: TSampler) -> Efficiency:
    """Minimal variance over the variance under a sampler (method, Section 3), by the midpoint rule on its cells."""
    values = np.maximum(second_moment(CENTRES), 0.0)
    return Efficiency(
        minimal_variance=float(np.sqrt(values).mean() ** 2 - mean**2),
        sampler_variance=float((values / sampler.density(CENTRES)).mean() - mean**2),
        uniform_variance=float(values.mean() - mean**2),
    )


# name → (the squared optimal density up to scale, the second moment that judges a density)
TARGETS: dict[str, Callable[[MomentCurves], tuple[Curve, Curve]]] = {
    "second_moment": lambda curves: (curves.second_moment, curves.second_moment),
    "paper": lambda curves: (curves.paper, curves.second_moment),
    "gradient": lambda curves: (curves.gradient, curves.gradient),
}


@dataclass(frozen=True)
class Fit:
    """A fitted density and what is known of it."""

    halves: Sequence[MomentSums]  # what it was fitted to
    sampler: TabulatedSampler
    density: Density  # without the floor
    floor: float  # λ
    curves: MomentCurves
    efficiency: Efficiency
    optimum: Curve

    @property
    def kl_from_optimum(self) -> float:
        """KL(optimum ‖ fitted family), nats."""
        return kl_divergence(self.optimum(CENTRES), np.maximum(self.density.unnormalized(CENTRES), 1e-300))


@dataclass(frozen=True)
class Calibrator:
    """One configuration's way from moments to a density. Pure: the same sums give the same density on every rank."""

    settings: CalibrationConfig
    exposures: Exposures
    seed: int

    def curves(self, sums: MomentSums) -> MomentCurves:
        return MOMENT_ESTIMATORS[self.settings.estimator](sums, self.exposures)

    def judge(self, sums: MomentSums, sampler: TSampler) -> Efficiency:
        """A sampler's efficiency under the curves that sums give."""
        curves = self.curves(sums)
        return efficiency(self._judging(curves), self._mean(curves), sampler)

    def fit(self, halves: Sequence[MomentSums]) -> Fit:
        """Fit to both halves together; the halves alone choose the floor, where it is 'auto'."""
        floor = self.settings.uniform_floor
        if floor == "auto":
            floor = self._harmless_floor(halves)
        curves = self.curves(halves[0].plus(halves[1]))
        optimum = self._optimum(curves)
        density = self._density(optimum, self.settings.num_restarts)
        sampler = TabulatedSampler.of(density.unnormalized, floor)
        result = efficiency(self._judging(curves), self._mean(curves), sampler)
        return Fit(halves, sampler, density, floor, curves, result, optimum)

    def bootstrap(self, moments: Floats, fit: Fit) -> Floats:
        """Efficiencies [NUM_RESAMPLES], under the fit's curves, of densities fitted to resampled groups [n, …]."""
        generator = stream(self.seed, Purpose.CALIBRATION, 2)
        num_groups, results = len(moments), np.empty(NUM_RESAMPLES)
        judging, mean = self._judging(fit.curves), self._mean(fit.curves)
        for index in range(NUM_RESAMPLES):
            multiplicity = np.bincount(generator.integers(0, num_groups, num_groups), minlength=num_groups)
            sums = MomentSums.of(moments, self.settings.num_times, multiplicity.astype(float))
            density = self._density(self._optimum(self.curves(sums)), num_restarts=1)
            sampler = TabulatedSampler.of(density.unnormalized, fit.floor)
            results[index] = efficiency(judging, mean, sampler).of_sampler
        return results

    def _harmless_floor(self, halves: Sequence[MomentSums]) -> float:
        """λ with the least variance when each half's density meets the other half's curve: do no harm."""
        variance = np.zeros(len(FLOORS))
        for mine, other in (halves, halves[::-1]):
            num_restarts = max(1, self.settings.num_restarts // 4)
            density = self._density(self._optimum(self.curves(mine)), num_restarts)
            judging = np.maximum(self._judging(self.curves(other))(CENTRES), 0.0)
            for index, floor in enumerate(FLOORS):
                p = TabulatedSampler.of(density.unnormalized, floor).cell_density
                variance[index] += (judging / p).mean()
        return FLOORS[int(variance.argmin())]

    def _density(self, optimum: Curve, num_restarts: int) -> Density:
        points = (np.arange(self.settings.num_times) + 1.0) / self.settings.num_times
        return DENSITIES[self.settings.density](FitInputs(optimum, points, num_restarts, self.seed))

    def _optimum(self, curves: MomentCurves) -> Curve:
        target, _ = TARGETS[self.settings.target](curves)
        least = _LEAST_TARGET * float(np.mean(target(CENTRES)))
        return lambda t: np.sqrt(np.maximum(target(t), least))

    def _judging(self, curves: MomentCurves) -> Curve:
        return TARGETS[self.settings.target](curves)[1]

    def _mean(self, curves: MomentCurves) -> float:
        """L, or 0 for the gradient, whose mean is not known."""
        return 0.0 if self.settings.target == "gradient" else float(curves.mean_loss(CENTRES).mean())
