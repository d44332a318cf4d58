"""Second moments of the loss as functions of t, from calibration losses: what P-POTS's density is fitted to.

Axes of the samples: i clean sample (a), j grid value of t (b), k mask (c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.mask_schedule import Floats, MaskSchedule
from megatron_mdm.diffusion.t_samplers import TSampler

BANDWIDTH = 0.05  # of the smoothing of token-level moments over t
# Curves are rounded far below their statistical error: losses differ between layouts in the last bits, and a fit of
# seven parameters would enlarge that until t itself differed.
SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True)
class CalibrationSamples:
    """Sums over the masked tokens of each calibration row, with c_i the cross-entropy of masked token i."""

    t: Floats  # [b] increasing, in (0, 1]
    num_eligible: NDArray[np.int64]  # [a]: P
    loss: Floats  # [a, b, c]: l = Σ c_i / (P q)
    ce_sum: Floats  # [a, b, c]: Σ c_i
    ce_square_sum: Floats  # [a, b, c]: Σ c_i²
    num_masked: Floats  # [a, b, c]: M


@dataclass(frozen=True)
class MomentCurves:
    """What a calibration knows of the loss at each grid point."""

    t: Floats  # [b]
    mean_loss: Floats  # [b]: estimate of g(t) = E[l | t]
    target: Floats  # [b]: the squared optimal density, up to scale
    second_moment: Callable[[Floats], Floats]  # t → E[l² | t], on all of [0, 1]

    def optimal_density(self) -> Floats:
        """p̂ [b] ∝ sqrt(target) (paper, Section 4.1)."""
        return np.sqrt(np.maximum(self.target, 0.0))


def naive_moments(samples: CalibrationSamples, _: MaskSchedule, target: str) -> MomentCurves:
    """The paper's estimates from the losses themselves.

    target 'paper': ĝ² + v̂ with v̂ the masking variance alone; 'second_moment': E[l² | t], which also counts the spread
    of g over samples and is the exact optimum.
    """
    loss = samples.loss
    mean_loss = _rounded(loss.mean((0, 2)))
    second_moment = _rounded(np.square(loss).mean((0, 2)))
    masking_variance = _rounded(loss.var(2, ddof=1).mean(0))
    target_curve = second_moment if target == "second_moment" else mean_loss**2 + masking_variance
    return MomentCurves(samples.t, mean_loss, target_curve, lambda t: np.interp(t, samples.t, second_moment))


def token_moments(samples: CalibrationSamples, schedule: MaskSchedule, target: str) -> MomentCurves:
    """E[l² | t] = A(t)/q + B(t), with the noise of the mask count integrated out.

    A = E[μ₂/P], B = E[κ (P−1)/P], where μ₂ = E[c_i² | i masked] and κ = E[c_i c_j | i ≠ j masked]; both are smooth in t
    and are estimated as ratios of sums over rows, by a local straight line in t.
    """
    assert target == "second_moment"
    p = samples.num_eligible[:, None, None].astype(np.float64)
    q = schedule.mask_probability(samples.t)
    pairs = np.square(samples.ce_sum) - samples.ce_square_sum
    masked_share = samples.num_masked / p
    pair_share = np.where(  # M(M−1)/(P(P−1)), of mean q²; rows with P = 1 have no pairs and stand at the mean
        p > 1, samples.num_masked * (samples.num_masked - 1) / np.maximum(p * (p - 1), 1.0), q[:, None] ** 2
    )

    def ratio(numerator: Floats, denominator: Floats) -> Floats:
        return _rounded(_local_ratio(samples.t, numerator.sum((0, 2)), denominator.sum((0, 2))))

    squares = ratio(samples.ce_square_sum / p**2, masked_share)
    products = ratio(pairs / p**2, pair_share)
    mean_loss = ratio(samples.ce_sum / p, masked_share)

    def second_moment(t: Floats) -> Floats:
        smooth_squares, smooth_products = (np.interp(t, samples.t, curve) for curve in (squares, products))
        return smooth_squares / schedule.mask_probability(t) + smooth_products

    return MomentCurves(samples.t, mean_loss, second_moment(samples.t), second_moment)


def _local_ratio(t: Floats, numerator: Floats, denominator: Floats) -> Floats:
    """A smooth, non-negative curve [b] through numerator/denominator, each point weighing as its denominator.

    Local-linear regression (Fan 1993) with a Gaussian kernel: unlike a local mean it has no bias of first order where
    weights or points lie on one side, as they do near t = 0.
    """
    distance = t[None, :] - t[:, None]
    kernel = np.exp(-0.5 * np.square(distance / BANDWIDTH))
    weight = kernel * denominator
    s0, s1, s2 = (np.sum(weight * distance**power, axis=1) for power in (0, 1, 2))
    n0, n1 = (np.sum(kernel * numerator * distance**power, axis=1) for power in (0, 1))
    return np.maximum((s2 * n0 - s1 * n1) / np.maximum(s0 * s2 - s1**2, 1e-300), 0.0)


def _rounded(values: Floats) -> Floats:
    exponent = np.floor(np.log10(np.maximum(np.abs(values), 1e-300)))
    scale = 10.0 ** (SIGNIFICANT_DIGITS - 1 - exponent)
    return np.round(values * scale) / scale


MOMENT_ESTIMATORS: dict[str, Callable[[CalibrationSamples, MaskSchedule, str], MomentCurves]] = {
    "token_moments": token_moments,
    "naive": naive_moments,
}


@dataclass(frozen=True)
class Efficiency:
    """Variances of the estimator w·l, under the calibration's own curve E[l² | t]."""

    minimal_variance: float  # (∫ sqrt(E[l²|t]) dt)² − L², no sampler of t has less
    sampler_variance: float  # ∫ E[l²|t]/p(t) dt − L²
    uniform_variance: float  # ∫ E[l²|t] dt − L²

    @property
    def of_sampler(self) -> float:
        return self.minimal_variance / self.sampler_variance

    @property
    def of_uniform(self) -> float:
        return self.minimal_variance / self.uniform_variance


def efficiency(curves: MomentCurves, sampler: TSampler, num_points: int = 8192) -> Efficiency:
    """Minimal variance over the variance under a sampler (method, Section 3), by the midpoint rule."""
    t = (np.arange(num_points) + 0.5) / num_points
    second_moment = np.maximum(curves.second_moment(t), 0.0)
    mean = float(np.interp(t, curves.t, curves.mean_loss).mean())
    return Efficiency(
        minimal_variance=float(np.sqrt(second_moment).mean() ** 2 - mean**2),
        sampler_variance=float((second_moment / sampler.density(t)).mean() - mean**2),
        uniform_variance=float(second_moment.mean() - mean**2),
    )
