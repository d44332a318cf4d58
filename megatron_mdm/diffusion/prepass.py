"""Which losses a calibration measures, and when it stops: rounds that double, or the paper's nested grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.calibrator import NUM_FOLDS, Calibrator, Fit
from megatron_mdm.diffusion.judge import Efficiency
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import MomentSums, nested_masking_variance
from megatron_mdm.diffusion.randomness import Purpose, stream

Integers = NDArray[np.int64]
Measure = Callable[[Integers, Floats], Floats]  # (sample [n], t [n]) → moments [n, …] of groups with masks of their own

NUM_RESAMPLES = 200
LOWER_QUANTILE = 0.05  # of the bootstrap's efficiencies
_GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its multiples fill [0, 1] evenly, however many are taken


@dataclass(frozen=True)
class Calibration:
    """A fit, and what losses that it was not fitted to say of it."""

    fit: Fit
    efficiency: Efficiency
    rounds: list[dict[str, float]]  # forwards, efficiency and its 5 % and 95 % bounds after each round


def calibrate_adaptively(measure: Measure, calibrator: Calibrator, num_samples: int, views: int) -> Calibration:
    """Rounds that double the groups until the lower bound of the efficiency reaches its target.

    num_samples: of the data set; views: rows of a group.
    """
    settings = calibrator.settings
    budget = max(2, settings.num_samples * settings.num_times * settings.num_masks // views)
    total = min(max(2, settings.initial_forwards // views), budget)
    moments: list[Floats] = []
    rounds: list[dict[str, float]] = []
    places = range(0)
    while True:
        places = range(places.stop, total)
        sample, quantile = spread_groups(num_samples, places, calibrator.seed)
        moments.append(measure(sample, denser_near_zero(quantile)))
        calibration = fitted(calibrator, np.concatenate(moments), np.arange(total) % num_samples, views)
        rounds += calibration.rounds
        if rounds[-1]["lower"] >= settings.target_efficiency < 1.0 or total >= budget:
            return replace(calibration, rounds=rounds)
        total = min(2 * total, budget)


def spread_groups(num_samples: int, places: range, seed: int) -> tuple[Integers, Floats]:
    """(sample, quantile) of the groups at these places of an endless sequence that spreads over data set and [0, 1]."""
    order = stream(seed, Purpose.CALIBRATION).permutation(num_samples)
    index = np.array(places)
    return order[index % num_samples], (0.5 + index * _GOLDEN) % 1.0


def denser_near_zero(quantile: Floats) -> Floats:
    """t with the density ½ + ¼ t^(−1/2): few tokens are masked near 0, and the weights of those few are large."""
    return np.square((np.sqrt(1.0 + 8.0 * quantile) - 1.0) / 2.0)


def nested_sizes(settings: CalibrationConfig, views: int) -> tuple[int, int]:
    """(samples, groups of `views` rows at each t) whose rows are at most the paper's a·b·c: of its c masks, as many as
    there are groups; of its a samples, those that two groups leave room for (config/validate.py: two at least)."""
    num_groups = max(2, settings.num_masks // views)
    return min(settings.num_samples, settings.num_samples * settings.num_masks // (num_groups * views)), num_groups


def calibrate_nested(measure: Measure, calibrator: Calibrator, num_samples: int, views: int) -> Calibration:
    """The paper's a samples × b values of t × c masks."""
    settings = calibrator.settings
    nested_samples, num_masks = nested_sizes(settings, views)
    nested_samples = min(nested_samples, num_samples)
    chosen = stream(calibrator.seed, Purpose.CALIBRATION).permutation(num_samples)[:nested_samples]
    t = (np.arange(settings.num_times) + 1.0) / settings.num_times
    per_sample = np.repeat(t, num_masks)
    moments = measure(np.repeat(chosen, len(per_sample)), np.tile(per_sample, nested_samples))
    sample = np.repeat(np.arange(nested_samples), len(per_sample))
    return fitted(calibrator, nested_masking_variance(moments, num_masks), sample, views)


DESIGNS: dict[str, Callable[[Measure, Calibrator, int, int], Calibration]] = {  # by calibration.estimator
    "token_moments": calibrate_adaptively,
    "naive": calibrate_nested,
}


def fitted(calibrator: Calibrator, moments: Floats, sample: Integers, views: int = 1) -> Calibration:
    """A fit to groups [n, …] of `views` rows, judged fold by fold; sample [n]: each group's, numbered from 0."""
    if not np.isfinite(moments).all():
        raise UserError("calibration: the losses are not finite; check the model's weights")
    if int(sample.max()) < NUM_FOLDS:  # a data set of so few samples: all of it is known
        sample = np.arange(len(moments))
    fold = sample % NUM_FOLDS
    num_cells = calibrator.settings.num_times
    folds = [MomentSums.of(moments[fold == index], num_cells) for index in range(NUM_FOLDS)]
    judge = calibrator.judge(moments, fold, NUM_FOLDS)
    fit = calibrator.fit(folds, judge)
    efficiency = fit.efficiency(judge)
    generator = stream(calibrator.seed, Purpose.CALIBRATION, 2)
    resamples = judge.bootstrap(fit.without, fit.sampler.cell_density, sample, NUM_RESAMPLES, generator)
    low, high = (float(value) for value in np.quantile(resamples, [LOWER_QUANTILE, 1.0 - LOWER_QUANTILE]))
    measured = {"forwards": len(moments) * views, "efficiency": efficiency.of_sampler, "lower": low, "upper": high}
    return Calibration(fit, efficiency, [measured])
