"""From losses to a density: moments, fits, efficiency and floor, against enumeration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.calibrator import FLOORS, Calibrator, efficiency
from megatron_mdm.diffusion.densities import DENSITIES, kl_divergence
from megatron_mdm.diffusion.epr import ExponentialPolynomialRoot, fit_epr
from megatron_mdm.diffusion.exposure import Exposures, exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.moments import (
    MOMENT_ESTIMATORS,
    Moments,
    MomentSums,
    group_moments,
    naive_moments,
    nested_masking_variance,
    token_moments,
)
from megatron_mdm.diffusion.noiser import noise
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler, UniformSampler
from tests.diffusion.toy import SCHEDULE, Toy, clean_batch, design, exact_mean, exact_variance, shapes

DESIGNS = {
    "single": design(),
    "mirror": design(complementary=True),
    "multisample": design(repeats=2),
    "exact_count": design("exact_count"),
    "exact_count_mirror": design("exact_count", complementary=True),
}


def known(masks: MaskDesign) -> Exposures:
    return exposures(masks, shapes(), NORMALIZATIONS["sample"])


def groups(toy: Toy, masks: MaskDesign, t: Floats, seed: int = 0) -> Floats:
    """Moments of groups at t [n], the toy's samples taking turns."""
    generator = np.random.default_rng(seed)
    noised = noise(clean_batch(len(t)), t, np.ones(len(t)), [generator] * len(t), design=masks, mask_id=9)
    rows = toy.rows(noised, np.arange(len(t)) % len(toy.tables))
    return group_moments(t, SCHEDULE.mask_probability(t), rows)


def even_times(num: int, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).permutation(num) + 0.5) / num


def second_moment(toy: Toy, name: str, t: Floats) -> Floats:
    """E[l² | t] of a group's mean, by enumeration."""
    rule = "exact_count" if name.startswith("exact_count") else "bernoulli"
    mean, square = toy.enumerate(t, rule)
    if name == "mirror":
        square = (square + toy.pair_product(t)) / 2
    elif name == "multisample":
        square = (square + mean**2) / 2
    return square.mean(0)


@pytest.mark.parametrize("name", ["single", "mirror", "multisample", "exact_count"])
def test_token_moments_agree_with_enumeration(name: str) -> None:
    toy, masks = Toy(), DESIGNS[name]
    curves = token_moments(MomentSums.of(groups(toy, masks, even_times(24000)), 70), known(masks))
    t = np.linspace(0.06, 0.94, 23)
    np.testing.assert_allclose(curves.second_moment(t), second_moment(toy, name, t), rtol=0.06)
    exact = toy.enumerate(t, "exact_count" if name == "exact_count" else "bernoulli")[0].mean(0)
    np.testing.assert_allclose(curves.mean_loss(t), exact, rtol=0.04)


@pytest.mark.parametrize("name", DESIGNS)
def test_exposures_agree_with_drawn_masks(name: str) -> None:
    """The known expectations of the weights, at one t each, within 4.5 standard errors."""
    masks, toy = DESIGNS[name], Toy()
    for value in (0.13, 0.5, 0.81):
        t = np.full(4000, value)
        generator = np.random.default_rng(1)
        noised = noise(clean_batch(len(t)), t, np.ones(len(t)), [generator] * len(t), design=masks, mask_id=9)
        rows = toy.rows(noised, np.zeros(len(t), dtype=int))
        expected = known(masks)(np.array([value]))
        weight, total = rows.weight, rows.weight.sum(1)
        drawn = {
            "total": weight.mean(1),
            "squares": rows.weight_square.mean(1),
            "pairs": (weight**2 - rows.weight_square).mean(1),
            "cross": total**2 - (weight**2).sum(1),
        }
        for field, values in drawn.items():
            error = values.std() / np.sqrt(len(values))
            assert abs(values.mean() - getattr(expected, field)[0]) <= 4.5 * error + 1e-6, (field, value)


def test_naive_moments_agree_with_enumeration() -> None:
    toy, times, masks = Toy(), np.arange(1, 21) / 20, 1500
    moments = groups(toy, design(), np.repeat(np.tile(times, 2), masks))
    curves = naive_moments(MomentSums.of(moments, 20), known(design()))
    mean, square = toy.enumerate(times)
    np.testing.assert_allclose(curves.mean_loss(times), mean.mean(0), rtol=0.06)
    np.testing.assert_allclose(curves.second_moment(times), square.mean(0), rtol=0.12)


def test_paper_target_leaves_out_the_spread_between_samples() -> None:
    """ĝ² + v̂ falls short of E[l²] by the variance of the samples' means, less their own noise."""
    times, num_masks = np.arange(1, 11) / 10, 300
    parts = []
    for sample in range(2):
        toy = Toy()
        toy.tables = toy.tables[sample : sample + 1]
        parts.append(nested_masking_variance(groups(toy, design(), np.repeat(times, num_masks), sample), num_masks))
    curves = naive_moments(MomentSums.of(np.concatenate(parts), 10), known(design()))
    losses = np.stack([part[:, Moments._fields.index("loss")].reshape(10, num_masks) for part in parts])
    spread = losses.mean(2).var(0) - losses.var(2, ddof=1).mean(0) / num_masks
    error = 1.5e-3 * curves.second_moment(times)  # three numbers of four digits
    assert (np.abs(curves.second_moment(times) - curves.paper(times) - spread) <= error).all()
    assert spread.max() > 10 * error[spread.argmax()]


def calibrator(masks: MaskDesign, **settings: Any) -> Calibrator:
    return Calibrator(CalibrationConfig(**settings), known(masks), 0)


def judged(toy: Toy, settings: dict[str, Any], num_groups: int, seed: int) -> float:
    """Efficiency of the density fitted from num_groups groups under the enumerated second moment."""
    moments = groups(toy, design(), even_times(num_groups, seed), seed)
    fit = calibrator(design(), **settings).fit([MomentSums.of(moments[first::2], 70) for first in (0, 1)])
    square = toy.enumerate(CENTRES)[1].mean(0)
    minimum = np.sqrt(square).mean() ** 2 - exact_mean(toy) ** 2
    return float(minimum / exact_variance(toy, fit.sampler))


def test_token_moments_need_fewer_forwards_than_naive() -> None:
    toy = Toy()
    token = [judged(toy, {}, 300, seed) for seed in range(6)]
    naive = [judged(toy, {"estimator": "naive", "density": "epr", "num_restarts": 4}, 300, seed) for seed in range(6)]
    assert np.mean(token) > np.mean(naive)
    assert np.mean(token) > 0.95


@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_beats_uniform_where_there_is_something_to_gain(name: str) -> None:
    toy = Toy()
    uniform = (np.sqrt(toy.enumerate(CENTRES)[1].mean(0)).mean() ** 2 - exact_mean(toy) ** 2) / exact_variance(
        toy, UniformSampler()
    )
    assert judged(toy, {"density": name, "num_restarts": 4}, 4000, 0) > uniform


def test_floor_is_chosen_by_what_the_other_half_says() -> None:
    """Many groups: little of the uniform. Halves that contradict each other: more of it."""
    toy = Toy()
    many = groups(toy, design(), even_times(6000))
    agreeing = calibrator(design()).fit([MomentSums.of(many[first::2], 70) for first in (0, 1)])
    assert agreeing.floor <= 0.1
    few = groups(toy, design(), even_times(40, 3), 3)
    low, high = few.copy(), few.copy()
    for column in range(2, few.shape[1]):
        low[few[:, 1] > 0.5, column] *= 1e-3 if column % 2 == 0 else 1.0
        high[few[:, 1] < 0.5, column] *= 1e-3 if column % 2 == 0 else 1.0
    contradicting = calibrator(design()).fit([MomentSums.of(part, 70) for part in (low, high)])
    assert contradicting.floor > agreeing.floor
    assert {agreeing.floor, contradicting.floor} <= set(FLOORS)


def test_bootstrap_narrows_with_more_groups() -> None:
    toy, fits = Toy(), {}
    for num_groups in (200, 3200):
        moments = groups(toy, design(), even_times(num_groups))
        maker = calibrator(design())
        fit = maker.fit([MomentSums.of(moments[first::2], 70) for first in (0, 1)])
        fits[num_groups] = float(np.quantile(maker.bootstrap(moments, fit), 0.05))
    assert fits[200] < fits[3200] <= 1.0 + 1e-9
    assert fits[3200] > 0.98


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
    curves = MOMENT_ESTIMATORS["token_moments"](
        MomentSums.of(groups(Toy(), design(), even_times(2000)), 70), known(design())
    )
    mean = float(curves.mean_loss(CENTRES).mean())
    optimal = TabulatedSampler.of(lambda t: np.sqrt(curves.second_moment(t)), 1e-9)
    assert efficiency(curves.second_moment, mean, optimal).of_sampler == pytest.approx(1.0, abs=1e-3)
    uniform = efficiency(curves.second_moment, mean, UniformSampler())
    assert uniform.of_sampler == pytest.approx(uniform.of_uniform)
    assert uniform.of_uniform < 1.0


def test_fit_minimises_the_divergence_from_the_points() -> None:
    """KL(points ‖ curve), not KL(curve ‖ points): where the family cannot follow two bumps, no small change of a
    parameter brings the curve closer in that sense."""
    t = np.linspace(0.02, 1.0, 50)
    points = 0.05 + np.exp(-0.5 * ((t - 0.3) / 0.06) ** 2) + 0.5 * np.exp(-0.5 * ((t - 0.7) / 0.05) ** 2)

    def divergence(curve: ExponentialPolynomialRoot) -> float:
        p, q = points, curve.unnormalized(t)
        p, q = p / np.trapezoid(p, t), q / np.trapezoid(q, t)
        return float(np.trapezoid(p * np.log(p / q), t))

    fit = fit_epr(t, points, num_restarts=4, seed=0)
    assert divergence(fit.curve) == pytest.approx(fit.kl_divergence, rel=1e-6)
    for name, value in fit.curve.parameters().items():
        for factor in (0.98, 1.02):
            changed = ExponentialPolynomialRoot(**{**fit.curve.parameters(), name: value * factor})
            assert divergence(changed) > fit.kl_divergence - 1e-5


def test_divergence_of_two_densities_has_a_direction() -> None:
    p, q = np.array([1.0, 3.0]), np.array([1.0, 1.0])
    assert kl_divergence(p, q) == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert kl_divergence(q, p) == pytest.approx(0.5 * np.log(2.0) + 0.5 * np.log(2.0 / 3.0))
