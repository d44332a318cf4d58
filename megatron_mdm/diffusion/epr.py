"""The exponential-polynomial-root density of P-POTS and its fit (paper, Section 4.1 and Appendix)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.randomness import Purpose, stream

_MAX_EXPONENT = 60.0  # of exp(2 κ t^m): keeps wild restarts finite


@dataclass(frozen=True)
class ExponentialPolynomialRoot:
    """p(t) ∝ sqrt( a t^r + b (1−t)^q + A² exp(2 κ t^m) ),  a, b, A, κ > 0;  r, q ≥ 0;  m > 1.

    The mean loss g(t) ~ A exp(κ t^m) has zero slope at t = 0; the masking variance v(t) ~ a t^r + b (1−t)^q.
    """

    a: float
    r: float
    b: float
    q: float
    amplitude: float  # A
    kappa: float
    m: float

    def unnormalized(self, t: Floats) -> Floats:
        """The density up to its constant, at t in [0, 1]."""
        exponent = np.minimum(2.0 * self.kappa * np.power(t, self.m), _MAX_EXPONENT)
        polynomial = self.a * np.power(t, self.r) + self.b * np.power(1.0 - t, self.q)
        return np.sqrt(polynomial + self.amplitude**2 * np.exp(exponent))

    def parameters(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class EprFit:
    curve: ExponentialPolynomialRoot
    kl_divergence: float  # KL(points ‖ curve), nats, both normalised on the grid


def fit_epr(t: Floats, density: Floats, *, num_restarts: int, seed: int) -> EprFit:
    """Fit by KL divergence to density values [b] (any scale, non-negative) at increasing t [b] in [0, 1].

    L-BFGS-B over softplus-transformed parameters from num_restarts seeded starting points; the best is kept.
    """
    from scipy.optimize import minimize  # here, as it takes a third of a second of a program's start

    cell = _trapezoid_weights(t)
    target = density / (cell @ density)
    entropy_terms = cell * target * np.log(np.maximum(target, 1e-300))

    def divergence(raw: Floats) -> float:
        values = np.maximum(_curve(raw).unnormalized(t), 1e-300)
        log_model = np.log(values / (cell @ values))
        result = float(entropy_terms.sum() - cell @ (target * log_model))
        return result if np.isfinite(result) else 1e6

    generator = stream(seed, Purpose.CALIBRATION, 1)
    best_raw = np.zeros(7)
    best = np.inf
    for restart in range(num_restarts):
        start = np.zeros(7) if restart == 0 else generator.normal(0.0, 2.0, 7)
        result = minimize(divergence, start, method="L-BFGS-B", bounds=[(-20.0, 20.0)] * 7)
        if result.fun < best:
            best_raw = result.x
            best = float(result.fun)
    return EprFit(_curve(best_raw), best)


def _curve(raw: Floats) -> ExponentialPolynomialRoot:
    a, r, b, q, amplitude, kappa, m = (float(value) for value in np.logaddexp(0.0, raw))  # softplus
    return ExponentialPolynomialRoot(a, r, b, q, amplitude, kappa, 1.0 + m)


def _trapezoid_weights(t: Floats) -> Floats:
    """Weights w with w @ f = trapezoid integral of f over the grid."""
    gaps = np.diff(t)
    return np.concatenate([[gaps[0]], gaps[:-1] + gaps[1:], [gaps[-1]]]) / 2.0
