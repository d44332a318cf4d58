"""From calibration losses to a density: moments, EPR fit and efficiency, against enumeration."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.diffusion.epr import ExponentialPolynomialRoot, fit_epr
from megatron_mdm.diffusion.moments import MOMENT_ESTIMATORS, CalibrationSamples, efficiency
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, UniformSampler
from tests.diffusion.toy import SCHEDULE, P, Toy, exact_mean


def calibration_samples(toy: Toy, num_times: int, num_masks: int, seed: int = 0) -> CalibrationSamples:
    generator = np.random.default_rng(seed)
    t = (np.arange(num_times) + 1.0) / num_times
    q = SCHEDULE.mask_probability(t)[None, :, None, None]
    masked = generator.random((len(toy.tables), num_times, num_masks, P)) < q
    index = (masked.astype(int) << np.arange(P)).sum(3)
    cross_entropy = toy.tables[np.arange(len(toy.tables))[:, None, None], index] * masked
    total = cross_entropy.sum(3)
    return CalibrationSamples(
        t,
        np.full(len(toy.tables), P),
        total / (P * q[..., 0]),
        total,
        (cross_entropy**2).sum(3),
        masked.sum(3).astype(float),
    )


def test_naive_moments_agree_with_enumeration() -> None:
    toy = Toy()
    samples = calibration_samples(toy, 40, 3000)
    curves = MOMENT_ESTIMATORS["naive"](samples, SCHEDULE, "second_moment")
    mean, square = toy.enumerate(curves.t)
    for power, estimate, exact in ((1, curves.mean_loss, mean), (2, curves.target, square)):
        error = (samples.loss**power).std(2).mean(0) / np.sqrt(samples.loss[:, 0].size)
        assert (np.abs(estimate - exact) < 4.5 * error + 5e-4 * exact).all()  # curves are rounded to 4 digits


def test_token_moments_agree_with_enumeration() -> None:
    toy = Toy()
    curves = MOMENT_ESTIMATORS["token_moments"](calibration_samples(toy, 40, 1000), SCHEDULE, "second_moment")
    mean, square = toy.enumerate(curves.t)
    inner = slice(4, -4)  # smoothing over t has an edge
    np.testing.assert_allclose(curves.mean_loss[inner], mean[inner], rtol=0.03)
    np.testing.assert_allclose(curves.target[inner], square[inner], rtol=0.03)


def test_paper_target_leaves_out_the_spread_between_samples() -> None:
    samples = calibration_samples(Toy(num_samples=6), 20, 400)
    naive = MOMENT_ESTIMATORS["naive"]
    paper, second = naive(samples, SCHEDULE, "paper").target, naive(samples, SCHEDULE, "second_moment").target
    spread = samples.loss.mean(2).var(0)  # of g over samples, plus a little masking noise
    np.testing.assert_allclose(second - paper, spread, rtol=0.15, atol=0.01)


def test_token_moments_need_fewer_forwards_than_naive() -> None:
    """Efficiency of the density fitted from 2 · 20 · 5 rows, judged by the enumerated second moment."""
    toy = Toy()
    t = (np.arange(8192) + 0.5) / 8192
    _, square = toy.enumerate(t)
    mean = exact_mean(toy)
    minimum = np.sqrt(square).mean() ** 2 - mean**2

    def judged(estimator: str) -> float:
        results = []
        for seed in range(6):
            samples = calibration_samples(toy, 20, 5, seed)
            curves = MOMENT_ESTIMATORS[estimator](samples, SCHEDULE, "second_moment")
            fit = fit_epr(curves.t, curves.optimal_density(), num_restarts=4, seed=0)
            sampler = TabulatedSampler.of(fit.curve.unnormalized, 0.02)
            results.append(minimum / ((square / sampler.density(t)).mean() - mean**2))
        return float(np.mean(results))

    token, naive = judged("token_moments"), judged("naive")
    assert token > naive
    assert token > 0.9


def test_epr_recovers_a_planted_curve() -> None:
    planted = ExponentialPolynomialRoot(a=0.3, r=2.0, b=0.5, q=3.0, amplitude=0.2, kappa=2.0, m=3.0)
    t = (np.arange(70) + 1.0) / 70
    fit = fit_epr(t, planted.unnormalized(t), num_restarts=20, seed=1)
    assert fit.kl_divergence < 1e-6
    ratio = fit.curve.unnormalized(t) / planted.unnormalized(t)
    assert ratio.std() / ratio.mean() < 5e-3


def test_epr_fit_is_a_function_of_its_arguments() -> None:
    t = (np.arange(30) + 1.0) / 30
    density = 1.0 + 0.3 * np.sin(5 * t)
    assert fit_epr(t, density, num_restarts=5, seed=2) == fit_epr(t, density, num_restarts=5, seed=2)


def test_efficiency_of_the_optimum_is_one_and_of_uniform_below() -> None:
    curves = MOMENT_ESTIMATORS["token_moments"](calibration_samples(Toy(), 40, 200), SCHEDULE, "second_moment")
    optimal = TabulatedSampler.of(lambda t: np.sqrt(curves.second_moment(t)), 1e-9)
    assert efficiency(curves, optimal).of_sampler == pytest.approx(1.0, abs=1e-3)
    uniform = efficiency(curves, UniformSampler())
    assert uniform.of_sampler == pytest.approx(uniform.of_uniform)
    assert uniform.of_uniform < 1.0
