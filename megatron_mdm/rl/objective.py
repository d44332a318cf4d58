"""The clipped objective of a completion and its derivative by every log-probability: what the training pass weighs by.

J = Σ n (min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) − β KL) is maximised, ρ = exp((v − v_old)/d). Since v is linear in
the log-probabilities ℓ, ∂J/∂ℓ[k, i] = c[k, i] ∂J/∂v, and Σ (∂J/∂ℓ) ℓ at constant weights has J's gradient: exactly, for
any ratio, clip and divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_mdm.config.schema import RlConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.rl.estimators import Coefficients, values


class Measures(NamedTuple):
    """Sums of one completion, for metrics(). A ratio is of a token that some row scores, or of the completion."""

    objective: float  # its share of J
    ratios: float  # how many
    ratio: float  # Σ ρ
    ratio_square: float
    ratio_min: float
    ratio_max: float
    log_ratio_abs: float  # Σ |log ρ|
    clipped_low: float  # how many are clipped below
    clipped_high: float
    kl: float  # Σ of the estimate that is trained on; 0 without a reference
    k1: float  # Σ (v − v_ref)/d
    scored: float  # how many log-probabilities there are
    cross_entropy: float  # Σ −ℓ
    noise: float  # variance, by rows, of the mean cross-entropy of its tokens; NaN with one row or pair
    mean: float  # that mean


class Gradient(NamedTuple):
    weight: Floats  # [K, P]: ∂J/∂ℓ; exactly 0 where unscored
    measures: Measures


def gradient(
    rl: RlConfig,
    coefficients: Coefficients,
    log_probs: Floats,
    old: Floats,
    reference: Floats | None,
    advantage: float,
) -> Gradient:
    """log_probs [K, P] float64, 0 where unscored; old, reference: values() of θ_old and of the reference (None where
    beta is 0)."""
    value = values(coefficients, log_probs)
    log_ratio = _total(coefficients, value - old) / coefficients.d
    ratio = np.exp(log_ratio)
    low, high = rl.clip_range
    clipped_low = (ratio < low) & (advantage < 0)  # strictly: at ratio 1 nothing is clipped, whatever epsilon
    high = high if advantage > 0 else rl.delta or np.inf
    clipped_high = (ratio > high) & (advantage != 0)
    bounded = np.where(clipped_low, low, np.where(clipped_high, high, ratio))
    objective = bounded * advantage
    slope = np.where(clipped_low | clipped_high, 0.0, ratio * advantage)  # of the objective, times d
    kl, k1 = np.zeros((2, len(ratio)))
    if reference is not None:
        difference = value - reference
        kl, kl_slope = KL_ESTIMATES[rl.kl](coefficients, difference)
        k1 = _total(coefficients, difference) / coefficients.d
        objective = objective - rl.beta * kl
        slope = slope - rl.beta * kl_slope
    by_value = slope * coefficients.n / coefficients.d  # [P], or [1] or [K'] at sequence level
    counted = coefficients.n > 0
    ratio, log_ratio = ratio[counted], log_ratio[counted]
    measures = Measures(
        objective=float((coefficients.n * objective).sum()),
        ratios=float(len(ratio)),
        ratio=float(ratio.sum()),
        ratio_square=float(np.square(ratio).sum()),
        ratio_min=float(ratio.min(initial=np.inf)),
        ratio_max=float(ratio.max(initial=-np.inf)),
        log_ratio_abs=float(np.abs(log_ratio).sum()),
        clipped_low=float((clipped_low & counted).sum()),
        clipped_high=float((clipped_high & counted).sum()),
        kl=float(kl[counted].sum()),
        k1=float(k1[counted].sum()),
        scored=float(np.count_nonzero(coefficients.c)),
        cross_entropy=float(-log_probs.sum()),
        **_spread(coefficients, log_probs),
    )
    return Gradient(coefficients.c * _of_rows(coefficients, by_value), measures)


KlEstimate = Callable[[Coefficients, Floats], tuple[Floats, Floats]]  # (…, v − v_ref) → (KL, d · its derivative by v)


def _k2(coefficients: Coefficients, difference: Floats) -> tuple[Floats, Floats]:
    """δ²/2: on policy its gradient is that of the reverse divergence."""
    total = _total(coefficients, difference)
    return 0.5 * np.square(total) / coefficients.d, total


def _k2_split(coefficients: Coefficients, difference: Floats) -> tuple[Floats, Floats]:
    """δ²/2 by products of different rows (or pairs) alone: E[δ̂²] = δ² + Var δ̂, but independent estimates have no
    covariance. The derivative by a row is the mean estimate of the others."""
    number = coefficients.parts
    others = (difference.sum() - difference) * number / (number - 1)
    return 0.5 * np.array([(others * difference).sum()]) / coefficients.d, others


def _k3(coefficients: Coefficients, difference: Floats) -> tuple[Floats, Floats]:
    """e^−δ + δ − 1 with δ per d."""
    scaled = _total(coefficients, difference) / coefficients.d
    return np.expm1(-scaled) + scaled, -np.expm1(-scaled)


KL_ESTIMATES: dict[str, KlEstimate] = {"k2": _k2, "k2_split": _k2_split, "k3": _k3}  # by rl.kl


def _total(coefficients: Coefficients, by_part: Floats) -> Floats:
    """[P] of tokens as they are, or the sum [1] of a completion's parts."""
    return by_part.sum(keepdims=True) if coefficients.of_sequence else by_part


def _of_rows(coefficients: Coefficients, by_value: Floats) -> Floats:
    """Derivatives by values, broadcast to [K, P]."""
    if not coefficients.of_sequence:
        return by_value[None, :]
    of_parts = np.broadcast_to(by_value, (coefficients.parts,))
    return of_parts.repeat(len(coefficients.c) // coefficients.parts)[:, None]


def _spread(coefficients: Coefficients, log_probs: Floats) -> dict[str, float]:
    """The mean cross-entropy of the scored tokens, and its variance by the choice of rows."""
    scored = coefficients.c != 0
    mean = -log_probs.sum() / max(scored.sum(), 1)
    rows = len(scored) - len(scored) % coefficients.parts  # without the full pass, where there are several parts
    counts = scored[:rows].reshape(coefficients.parts, -1).sum(1)
    sums = -log_probs[:rows].reshape(coefficients.parts, -1).sum(1)
    means = sums[counts > 0] / counts[counts > 0]
    return {"mean": float(mean), "noise": float(means.var(ddof=1) / len(means)) if len(means) > 1 else float("nan")}


def metrics(measures: Floats) -> dict[str, float]:
    """Of an optimizer step, by TRL's names, from the Measures of all completions that count, [N, F]; empty where no row
    scores anything."""
    of = dict(zip(Measures._fields, measures[measures[:, Measures._fields.index("scored")] > 0].T))
    number = of["ratios"].sum()
    if not number:
        return {}
    mean = of["ratio"].sum() / number
    result = {
        "objective": of["objective"].sum(),
        "ratio/mean": mean,
        "ratio/std": np.sqrt(max(of["ratio_square"].sum() / number - mean**2, 0.0)),
        "ratio/min": of["ratio_min"].min(),
        "ratio/max": of["ratio_max"].max(),
        "log_ratio_abs": of["log_ratio_abs"].sum() / number,
        "clip_ratio/low_mean": of["clipped_low"].sum() / number,
        "clip_ratio/low_min": (of["clipped_low"] / of["ratios"]).min(),
        "clip_ratio/high_mean": of["clipped_high"].sum() / number,
        "clip_ratio/high_max": (of["clipped_high"] / of["ratios"]).max(),
        "clip_ratio/region_mean": (of["clipped_low"] + of["clipped_high"]).sum() / number,
        "kl": of["kl"].sum() / number,
        "kl_k1": of["k1"].sum() / number,
        "entropy": of["cross_entropy"].sum() / of["scored"].sum(),
    }
    noise = of["noise"][np.isfinite(of["noise"])]
    if len(noise) and len(of["mean"]) > 1 and of["mean"].var():
        result["noise_share"] = noise.mean() / of["mean"].var(ddof=1)
    return {name: float(value) for name, value in result.items()}
