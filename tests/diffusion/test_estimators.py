"""Every training estimator against enumeration of all masks and quadrature over t, on a tiny random transformer.

Unbiasedness of the loss and of a coordinate of its gradient, and the exact variances.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest

from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, TSampler, UniformSampler
from tests.diffusion.toy import (
    COSINE,
    EPSILON,
    KINDS,
    MASKS,
    P,
    Toy,
    clean_batch,
    design,
    exact_mean,
    exact_variance,
    mask_probabilities,
    midpoints,
)

GLOBAL_SIZE = 64
NUM_STEPS = 300
SAMPLERS: dict[str, TSampler] = {
    "uniform": UniformSampler(),
    "steep": TabulatedSampler.of(lambda t: 1.0 / (0.02 + t), 0.02),
    "rising": TabulatedSampler.of(lambda t: 0.1 + t**3, 0.02),
}
DESIGNS = {
    "single": design(),
    "mirror": design(complementary=True),
    "multisample": design(repeats=3),
    "two_pairs": design(complementary=True, repeats=2),
    "exact_count": design("exact_count"),
    "exact_count_mirror": design("exact_count", complementary=True),
}


def rule_of(name: str) -> str:
    return "exact_count" if name.startswith("exact_count") else "bernoulli"


def noiser(sampler: TSampler, masks: MaskDesign, num_strata: int, global_size: int = GLOBAL_SIZE) -> Noiser:
    return Noiser(design=masks, sampler=sampler, num_strata=num_strata, global_size=global_size, mask_id=9, seed=3)


def estimates(toy: Toy, make_noise: Noiser, steps: int = NUM_STEPS) -> np.ndarray:
    """w·l of every sample [steps, n]; the toy's samples take turns."""
    batch = clean_batch(make_noise.global_size)
    which = np.arange(make_noise.global_size) % len(toy.tables)
    result = []
    for step in range(steps):
        noised = make_noise(batch, step)
        result.append(noised.sample_weight.numpy() * toy.losses(noised, which))
    return np.array(result)


@cache
def exact_means(rule: str) -> list[float]:
    """By enumeration: of the loss, and of a coordinate of its gradient."""
    return [exact_mean(Toy(kind), rule) for kind in KINDS]


@pytest.mark.parametrize(("name", "sampler"), list(itertools.product(DESIGNS, SAMPLERS)))
@pytest.mark.parametrize("num_strata", [1, 4, GLOBAL_SIZE])
def test_estimator_is_unbiased_in_value_and_gradient(name: str, sampler: str, num_strata: int) -> None:
    make_noise = noiser(SAMPLERS[sampler], DESIGNS[name], num_strata)
    batch = clean_batch(GLOBAL_SIZE)
    toys = [Toy(kind) for kind in KINDS]
    which = np.arange(GLOBAL_SIZE) % 2
    means = []
    for step in range(NUM_STEPS):
        noised = make_noise(batch, step)
        means.append([(noised.sample_weight.numpy() * toy.losses(noised, which)).mean() for toy in toys])
    steps = np.array(means)  # independent over steps
    error = steps.std(0, ddof=1) / np.sqrt(len(steps))
    assert (np.abs(steps.mean(0) - exact_means(rule_of(name))) < 4 * error).all()


def mean_over_cosine_rates(toy: Toy, rule: str) -> float:
    """∫ p(r) g(r) dr with MMaDA's density p(r) = 2 / (π √(1 − r²)) of rates, g the mean over masks of Σ c / (q P).

    For counts by the law of M alone: it is M where a ≤ r < b, with probability (2/π) (arcsin b − arcsin a).
    """
    total = toy.of_masks(np.ones((1, 1)))[:, 0]  # Σ c / P of every mask [samples, 2^P]
    number = MASKS.sum(1)
    if rule == "bernoulli":  # r = sin θ, θ uniform, by quadrature
        r = np.sin(0.5 * np.pi * midpoints())[:, None]
        q = (1 - EPSILON) * r + EPSILON
        return float((total[:, None] * q**number * (1 - q) ** (P - number) / q).sum(2).mean())
    count = np.arange(1, P + 1)
    edges = {"exact_count": count / P, "rounded_count": (count + 0.5) / P}[rule]
    law = np.diff(np.arcsin(np.minimum([0.0, *edges], 1.0))) * 2 / np.pi
    mean = np.array([total[:, number == m].mean() * P / m for m in count])  # a uniformly random subset of m
    return float(law @ mean)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("rule", MASKING_RULES)
def test_cosine_rates_are_mmadas_objective(rule: str, complementary: bool) -> None:
    """By uniform t and by another density of t, as P-POTS finds them, in value and gradient."""
    toys = [Toy(kind).steeper() for kind in KINDS]
    exact = np.array([mean_over_cosine_rates(toy, rule) for toy in toys])
    bound = np.array([exact_mean(toy, "bernoulli") for toy in toys])
    batch = clean_batch(GLOBAL_SIZE)
    which = np.arange(GLOBAL_SIZE) % 2
    for sampler in (UniformSampler(), TabulatedSampler.of(lambda t: 0.3 + t**2, 0.02)):
        make_noise = noiser(sampler, design(rule, complementary, schedule=COSINE), 1)
        means = []
        for step in range(NUM_STEPS // 2):
            noised = make_noise(batch, step)
            means.append([(noised.sample_weight.numpy() * toy.losses(noised, which)).mean() for toy in toys])
        steps = np.array(means)
        error = steps.std(0, ddof=1) / np.sqrt(len(steps))
        assert (np.abs(steps.mean(0) - exact) < 4 * error).all()
        assert np.abs(steps.mean(0) - bound)[0] > 8 * error[0]  # another objective than the bound


@pytest.mark.parametrize("kind", KINDS)
def test_exact_count_has_the_expectation_of_bernoulli_without_epsilon(kind: str) -> None:
    """By quadrature over t (a polynomial of degree P − 1, exact with P nodes) of the enumerated Bernoulli masks."""
    toy = Toy(kind)
    nodes, weights = np.polynomial.legendre.leggauss(P)
    t = (nodes + 1) / 2
    total = toy.of_masks(np.ones((1, 1)))[:, 0]  # Σ c / P of every mask
    number = np.array([bin(mask).count("1") for mask in range(2**P)])
    bernoulli = sum(
        w / 2 * (total * np.where(number > 0, u ** (number - 1.0) * (1 - u) ** (P - number), 0.0)).sum(1)
        for u, w in zip(t, weights)
    )
    exact = toy.enumerate(midpoints(P), "exact_count")[0].mean(1)  # one midpoint for each count
    np.testing.assert_allclose(exact, bernoulli, rtol=1e-12)


@pytest.mark.parametrize("rule", ["bernoulli", "exact_count"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variance_of_importance_sampling_is_the_integral(sampler: str, rule: str) -> None:
    toy = Toy()
    values = estimates(toy, noiser(SAMPLERS[sampler], design(rule), 1)).ravel()
    squares = (values - values.mean()) ** 2
    error = squares.std(ddof=1) / np.sqrt(len(squares))
    assert abs(squares.mean() - exact_variance(toy, SAMPLERS[sampler], rule)) < 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_exact_optimum_reaches_the_minimal_variance(kind: str) -> None:
    toy = Toy(kind)
    t = midpoints(4096)
    square = toy.enumerate(t)[1].mean(0)
    optimal = TabulatedSampler(np.sqrt(square))
    minimum = np.sqrt(square).mean() ** 2 - exact_mean(toy) ** 2
    assert exact_variance(toy, optimal) == pytest.approx(minimum, rel=0.02)
    assert minimum < exact_variance(toy, UniformSampler())
    values = estimates(toy, noiser(optimal, design(), 1), 1000).ravel()
    squares = (values - values.mean()) ** 2
    assert abs(squares.mean() - minimum) < 4 * squares.std(ddof=1) / np.sqrt(len(squares))


def test_mirror_has_the_masking_noise_that_its_correlation_says() -> None:
    """A of the pair is (1 + ρ)/2 of one view's at every t, at most 1/2 where ρ ≤ 0; estimates at fixed t agree."""
    toy = Toy(num_samples=1)
    t = np.array([0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
    mean, square = (values[0] for values in toy.enumerate(t))
    single = square - mean**2
    correlation = (toy.pair_product(t)[0] - mean**2) / single
    assert (correlation < 0).any()
    pair = single / 2 * (1 + correlation)
    assert (pair[correlation <= 0] <= single[correlation <= 0] / 2 * (1 + 1e-12)).all()
    for index, value in enumerate(t):
        fixed = noiser(TabulatedSampler(np.ones(2)), design(complementary=True), 1)
        fixed.times = lambda step, value=value: (np.full(GLOBAL_SIZE, value), np.ones(GLOBAL_SIZE))  # type: ignore
        values = estimates(toy, fixed, 100).ravel()
        squares = (values - mean[index]) ** 2
        assert abs(squares.mean() - pair[index]) < 4.5 * squares.std(ddof=1) / np.sqrt(len(squares)), value


@pytest.mark.parametrize("num_strata", [4, 16])
def test_strata_remove_exactly_the_between_stratum_part(num_strata: int) -> None:
    """n · Var(batch mean) = Var(l) − the variance of g's means over the strata, which is part of B. With exact-count
    masks, whose remaining noise does not hide it."""
    toy = Toy(num_samples=1)
    g = toy.enumerate(midpoints(), "exact_count")[0][0]
    between = g.reshape(num_strata, -1).mean(1).var()
    means = estimates(toy, noiser(UniformSampler(), design("exact_count"), num_strata, 16), 6000).mean(1)
    squares = (means - means.mean()) ** 2 * 16
    error = squares.std(ddof=1) / np.sqrt(len(squares))
    expected = exact_variance(toy, UniformSampler(), "exact_count") - between
    assert abs(squares.mean() - expected) < 4 * error
    assert between > 4 * error  # the test would notice its absence


def test_decomposition_adds_up_to_the_variance_of_the_loss() -> None:
    toy = Toy()
    t = midpoints()
    mean, square = toy.enumerate(t)
    a = (square - mean**2).mean()
    b = mean.var(1).mean()
    c = mean.mean(1).var()
    assert a + b + c == pytest.approx(exact_variance(toy, UniformSampler()), rel=1e-9)


def test_noise_is_a_function_of_step_and_position_alone() -> None:
    """The same whether the global batch comes whole or in micro-batches, in any order, before or after other steps."""
    make_noise = noiser(SAMPLERS["steep"], DESIGNS["two_pairs"], 4)
    whole = make_noise(clean_batch(GLOBAL_SIZE), 7)
    batch = clean_batch(GLOBAL_SIZE)
    again = noiser(SAMPLERS["steep"], DESIGNS["two_pairs"], 4)
    again(batch, 3)
    for rows in ([5, 2], [0, 15, 9]):
        fields = {name: value[rows] for name, value in vars(batch).items() if value is not None}
        part = type(batch)(**fields)
        noised = again(part, 7)
        views = whole.masked.view(4, GLOBAL_SIZE, P)
        assert (noised.masked.view(4, len(rows), P) == views[:, rows]).all()
        assert (noised.t == whole.t[rows]).all()
        assert (noised.sample_weight == whole.sample_weight[rows]).all()


def test_every_row_of_exact_count_has_a_masked_token() -> None:
    noised = noiser(UniformSampler(), DESIGNS["exact_count_mirror"], 1)(clean_batch(GLOBAL_SIZE), 0)
    assert (noised.masked.sum(1) >= 1).all()
    assert mask_probabilities(np.array([0.0, 0.999]), "exact_count")[1].tolist() == [1 / P, 1.0]
