"""From losses to a density: moments, fits, efficiency and floor, against enumeration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.calibrator import FLOORS, NUM_FOLDS, Calibrator, Fit
from megatron_mdm.diffusion.curves import naive_moments, token_moments
from megatron_mdm.diffusion.densities import DENSITIES
from megatron_mdm.diffusion.epr import ExponentialPolynomialRoot, fit_epr
from megatron_mdm.diffusion.exposure import Exposures, SampleShapes, exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.moments import Moments, MomentSums, RowSums, group_moments, nested_masking_variance
from megatron_mdm.diffusion.noiser import noise
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.diffusion.t_samplers import CENTRES, UniformSampler
from tests.diffusion.toy import COSINE, SCHEDULE, Toy, clean_batch, design, exact_mean, exact_variance, shapes

DESIGNS = {
    "single": design(),
    "mirror": design(complementary=True),
    "multisample": design(repeats=2),
    "exact_count": design("exact_count"),
    "exact_count_mirror": design("exact_count", complementary=True),
    "rounded_cosine_mirror": design("rounded_count", complementary=True, schedule=COSINE),
}


def known(masks: MaskDesign) -> Exposures:
    return exposures(masks, shapes(), NORMALIZATIONS["sample"])


def groups(toy: Toy, masks: MaskDesign, t: Floats, seed: int = 0) -> Floats:
    """Moments of groups at t [n], the toy's samples taking turns."""
    generator = np.random.default_rng(seed)
    noised = noise(clean_batch(len(t)), t, np.ones(len(t)), [generator] * len(t), design=masks, mask_id=9)
    rows = toy.rows(noised, np.arange(len(t)) % len(toy.tables))
    return group_moments(t, masks.schedule.mask_probability(t), rows)


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
    toy = Toy()
    masks = DESIGNS[name]
    curves = token_moments(MomentSums.of(groups(toy, masks, even_times(24000)), 70), known(masks))
    t = np.linspace(0.06, 0.94, 23)
    np.testing.assert_allclose(curves.second_moment(t), second_moment(toy, name, t), rtol=0.06)
    exact = toy.enumerate(t, "exact_count" if name == "exact_count" else "bernoulli")[0].mean(0)
    np.testing.assert_allclose(curves.mean_loss(t), exact, rtol=0.04)


@pytest.mark.parametrize("name", DESIGNS)
def test_exposures_agree_with_drawn_masks(name: str) -> None:
    """The known expectations of the weights, at one t each, within 4.5 standard errors."""
    masks = DESIGNS[name]
    toy = Toy()
    for value in (0.13, 0.5, 0.81):
        t = np.full(4000, value)
        generator = np.random.default_rng(1)
        noised = noise(clean_batch(len(t)), t, np.ones(len(t)), [generator] * len(t), design=masks, mask_id=9)
        rows = toy.rows(noised, np.zeros(len(t), dtype=int))
        expected = known(masks)(np.array([value]))
        weight = rows.weight
        total = rows.weight.sum(1)
        drawn = {
            "total": weight.mean(1),
            "squares": rows.weight_square.mean(1),
            "pairs": (weight**2 - rows.weight_square).mean(1),
            "cross": total**2 - (weight**2).sum(1),
        }
        for field, values in drawn.items():
            error = values.std() / np.sqrt(len(values))
            assert abs(values.mean() - getattr(expected, field)[0]) <= 4.5 * error + 1e-6, (field, value)


@pytest.mark.parametrize("views", [1, 2])
def test_gradient_curve_agrees_with_its_formula(views: int) -> None:
    """Samples of two lengths n whose token gradients all have the square 0.3: E[‖h‖² | t] is the mean of 0.3 / (q n)
    over the samples, divided by the number of views."""
    lengths = np.array([3.0, 12.0])
    t = even_times(2000)
    q = SCHEDULE.mask_probability(t)
    length = lengths[np.arange(len(t)) % 2, None]
    num_masked = np.random.default_rng(0).binomial(length.astype(int), q[:, None], (len(t), views))
    weight = num_masked / (q[:, None] * length)  # of a row; each token's is 1 / (q n)
    weight_square = weight / (q[:, None] * length)
    rows = RowSums(weight, weight_square, 0.3 * weight_square, weight, weight_square)
    of_both_lengths = exposures(
        design(repeats=views), SampleShapes.of(lengths.astype(int), np.zeros(2, int)), NORMALIZATIONS["sample"]
    )
    curves = token_moments(MomentSums.of(group_moments(t, q, rows), 70), of_both_lengths)
    at = np.linspace(0.06, 0.94, 23)
    expected = 0.3 * np.mean(1 / (SCHEDULE.mask_probability(at)[:, None] * lengths), axis=1) / views
    # Every ratio of sums is 0.3, so the rate is exact but for the rounding of its logarithm to 1/1000.
    np.testing.assert_allclose(curves.gradient(at), expected, rtol=1e-3)


def test_naive_moments_agree_with_enumeration() -> None:
    toy = Toy()
    times = np.arange(1, 21) / 20
    masks = 1500
    moments = groups(toy, design(), np.repeat(np.tile(times, 2), masks))
    curves = naive_moments(MomentSums.of(moments, 20), known(design()))
    mean, square = toy.enumerate(times)
    np.testing.assert_allclose(curves.mean_loss(times), mean.mean(0), rtol=0.06)
    np.testing.assert_allclose(curves.second_moment(times), square.mean(0), rtol=0.12)


def test_paper_target_leaves_out_the_spread_between_samples() -> None:
    """ĝ² + v̂ falls short of E[l²] by the variance of the samples' means, less their own noise."""
    times = np.arange(1, 11) / 10
    num_masks = 300
    parts = []
    for sample in range(2):
        toy = Toy()
        toy.tables = toy.tables[sample : sample + 1]
        parts.append(nested_masking_variance(groups(toy, design(), np.repeat(times, num_masks), sample), num_masks))
    curves = naive_moments(MomentSums.of(np.concatenate(parts), 10), known(design()))
    losses = np.stack([part[:, Moments._fields.index("loss")].reshape(10, num_masks) for part in parts])
    spread = losses.mean(2).var(0) - losses.var(2, ddof=1).mean(0) / num_masks
    error = 1.6e-3 * curves.second_moment(times)  # logarithms of three numbers, rounded by at most 1/2000
    assert (np.abs(curves.second_moment(times) - curves.paper(times) - spread) <= error).all()
    assert spread.max() > 10 * error[spread.argmax()]


def calibrator(masks: MaskDesign, **settings: Any) -> Calibrator:
    return Calibrator(CalibrationConfig(**settings), known(masks), 0)


def fitted(maker: Calibrator, moments: Floats) -> Fit:
    """Fitted to groups, every fourth in each fold."""
    fold = np.arange(len(moments)) % NUM_FOLDS
    folds = [MomentSums.of(moments[fold == index], maker.settings.num_times) for index in range(NUM_FOLDS)]
    return maker.fit(folds, maker.judge(moments, fold, NUM_FOLDS))


def efficiency_of(toy: Toy, settings: dict[str, Any], num_groups: int, seed: int) -> float:
    """Efficiency of the density fitted from num_groups groups under the enumerated second moment."""
    fit = fitted(calibrator(design(), **settings), groups(toy, design(), even_times(num_groups, seed), seed))
    square = toy.enumerate(CENTRES)[1].mean(0)
    minimum = np.sqrt(square).mean() ** 2 - exact_mean(toy) ** 2
    return float(minimum / exact_variance(toy, fit.sampler))


def test_token_moments_need_fewer_forwards_than_naive() -> None:
    toy = Toy()
    token = [efficiency_of(toy, {}, 300, seed) for seed in range(6)]
    naive = [
        efficiency_of(toy, {"estimator": "naive", "density": "epr", "num_restarts": 4}, 300, seed) for seed in range(6)
    ]
    assert np.mean(token) > np.mean(naive)
    assert np.mean(token) > 0.95


@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_beats_uniform_where_there_is_something_to_gain(name: str) -> None:
    toy = Toy()
    uniform = (np.sqrt(toy.enumerate(CENTRES)[1].mean(0)).mean() ** 2 - exact_mean(toy) ** 2) / exact_variance(
        toy, UniformSampler()
    )
    assert efficiency_of(toy, {"density": name, "num_restarts": 4}, 4000, 0) > uniform


@pytest.mark.parametrize("rule", ["bernoulli", "rounded_count"])
def test_p_pots_finds_the_density_of_cosine_rates(rule: str) -> None:
    """By enumeration it takes off nearly all that uniform t has above the least variance. Not all: with so few tokens
    the best density for counts is a staircase, and a fit is smooth."""
    toy = Toy().steeper()
    masks = design(rule, schedule=COSINE)
    fit = fitted(calibrator(masks), groups(toy, masks, even_times(2000)))
    mean, square = (moment.mean(0) for moment in toy.enumerate(CENTRES, rule, COSINE))
    least = np.sqrt(square).mean() ** 2
    fitted_square = (square / fit.sampler.density(CENTRES)).mean()
    assert (square.mean() - fitted_square) / (square.mean() - least) > 0.9
    assert square.mean() - mean.mean() ** 2 > 1.3 * (least - mean.mean() ** 2)  # there is something to gain


def test_floor_is_chosen_by_what_the_other_folds_say() -> None:
    """Many groups: little of the uniform. Folds that contradict each other: more of it."""
    toy = Toy()
    maker = calibrator(design())
    many = groups(toy, design(), even_times(6000))
    assert fitted(maker, many).floor == FLOORS[0]
    # Each fold loses all that is seen in a quarter of [0, 1]; what the others say of that quarter is not so in it.
    t = many[:, 1]
    fold = np.arange(len(many)) % NUM_FOLDS
    contradicting = many.copy()
    contradicting[:, 2:] *= np.where((t * NUM_FOLDS).astype(int) == fold, 30.0, 1.0)[:, None]
    assert fitted(maker, contradicting).floor in FLOORS[1:]


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
