"""From moments to the density of t that training samples, with a floor that does no harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.curves import MOMENT_ESTIMATORS, Curve, MomentCurves
from megatron_mdm.diffusion.densities import DENSITIES, Density, FitInputs, kl_divergence
from megatron_mdm.diffusion.exposure import Exposures
from megatron_mdm.diffusion.judge import Efficiency, Judge
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import MomentSums
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler

NUM_FOLDS = 4  # of the samples; every density is judged by the fold that it was fitted without
FLOORS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # candidates for λ
_LEAST_TARGET = 1e-6  # of the mean target: where no loss was seen, t must still be reachable

# name → the squared optimal density, up to scale
TARGETS: dict[str, Callable[[MomentCurves], Curve]] = {
    "second_moment": lambda curves: curves.second_moment,
    "paper": lambda curves: curves.paper,
    "gradient": lambda curves: curves.gradient,
}


@dataclass(frozen=True)
class Fit:
    """A fitted density and what is known of it."""

    folds: Sequence[MomentSums]  # what it was fitted to
    sampler: TabulatedSampler
    without_fold: Sequence[Curve]  # densities fitted without one of them, without the floor and unnormalised
    density: Density  # without the floor
    floor: float  # λ
    curves: MomentCurves
    optimum: Curve

    @property
    def kl_from_optimum(self) -> float:
        """KL(optimum ‖ fitted family), nats."""
        return kl_divergence(self.optimum(CENTRES), np.maximum(self.density.unnormalized(CENTRES), 1e-300))

    @property
    def without(self) -> list[Floats]:
        """The densities [4096] that would be sampled from without one of the folds each."""
        return [TabulatedSampler.of(curve, self.floor).cell_density for curve in self.without_fold]

    def with_floor(self, floor: float) -> Fit:
        """The same density on another floor."""
        return replace(self, floor=floor, sampler=TabulatedSampler.of(self.density.unnormalized, floor))

    def efficiency(self, judge: Judge) -> Efficiency:
        return judge.efficiency(self.without, self.sampler.cell_density)


@dataclass(frozen=True)
class Calibrator:
    """One configuration's way from moments to a density. Pure: the same sums give the same density on every rank."""

    settings: CalibrationConfig
    exposures: Exposures
    seed: int

    def judge(self, moments: Floats, fold: np.ndarray | None = None, num_folds: int = 1) -> Judge:
        return Judge(moments, self.exposures, self.settings.target, fold, num_folds)

    def fit(self, folds: Sequence[MomentSums], judge: Judge) -> Fit:
        """Fit to all folds together; where the floor is 'auto', the judge of the folds chooses it."""
        rest = [_sum([*folds[:place], *folds[place + 1 :]]) for place in range(len(folds))]
        restarts = max(1, self.settings.num_restarts // 4)
        without = [self._density(self._optimum(self._curves(sums)), restarts).unnormalized for sums in rest]
        floor = self.settings.uniform_floor
        if floor == "auto":
            floor = _harmless_floor(without, judge)
        curves = self._curves(_sum(folds))
        optimum = self._optimum(curves)
        density = self._density(optimum, self.settings.num_restarts)
        sampler = TabulatedSampler.of(density.unnormalized, floor)
        return Fit(folds, sampler, without, density, floor, curves, optimum)

    def _curves(self, sums: MomentSums) -> MomentCurves:
        return MOMENT_ESTIMATORS[self.settings.estimator](sums, self.exposures)

    def _density(self, optimum: Curve, num_restarts: int) -> Density:
        points = (np.arange(self.settings.num_times) + 1.0) / self.settings.num_times
        return DENSITIES[self.settings.density](FitInputs(optimum, points, num_restarts, self.seed))

    def _optimum(self, curves: MomentCurves) -> Curve:
        target = TARGETS[self.settings.target](curves)
        least = _LEAST_TARGET * float(np.mean(target(CENTRES))) or 1.0  # without any loss: uniform
        return lambda t: np.sqrt(np.maximum(target(t), least))


def _sum(parts: Sequence[MomentSums]) -> MomentSums:
    return MomentSums(np.sum([part.sums for part in parts], axis=0))


def _harmless_floor(without: Sequence[Curve], judge: Judge) -> float:
    """The least λ whose variance, when the density without each fold meets that fold, exceeds the least one by no more
    than two standard errors: do no harm, but trust the fit where the losses cannot tell."""
    choices = [[TabulatedSampler.of(curve, floor).cell_density for curve in without] for floor in FLOORS]
    moments, error = judge.second_moments(choices)
    return FLOORS[int(np.argmax(moments - moments.min() <= 2.0 * error))]
