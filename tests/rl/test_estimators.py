"""Every estimator's expectation, in value and gradient, against its definition: over all masks and rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import DiffusionConfig, RlConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import TSampler
from megatron_mdm.rl.estimators import Totals, coefficients, values
from megatron_mdm.rl.noise import Rows
from megatron_mdm.rl.objective import gradient
from megatron_mdm.rl.times import gauss_legendre
from tests.rl.toy import (
    EPSILON,
    STEEP,
    UNIFORM,
    Toy,
    all_masks,
    bernoulli_numbers,
    expectation,
    noise_of,
    ordered_numbers,
    settings,
    toy,
)

P = 5
TOTALS = Totals(num_completions=8, num_tokens=40)
N, TOKENS = TOTALS
ADVANTAGE = 0.7
SAMPLERS = {"uniform": UNIFORM, "steep": STEEP}


def trained(rl: RlConfig, this: Toy) -> Callable[[Rows], Floats]:
    """rows → Σ (∂J/∂ℓ) (ℓ, ∇ℓ) at ratio 1, [1 + n]: n v / d, and the gradient of the update."""

    def of(rows: Rows) -> Floats:
        table = this.of(rows.masked)
        constants = coefficients(rl, rows, TOTALS)
        log_probs = table[:, :, 0] * rows.scored
        old = values(constants, log_probs)
        weight = gradient(rl, constants, log_probs, old, None, ADVANTAGE).weight
        return np.einsum("kp,kpn->n", weight, table)

    return of


def mean(rl: RlConfig, diffusion: DiffusionConfig, sampler: TSampler = UNIFORM, scored: int = P) -> Floats:
    this = toy(scored)
    return expectation(noise_of(rl, diffusion, sampler), diffusion.masking, this, trained(rl, this)) / ADVANTAGE


def integral(of: Callable[[float], Floats], lower: float = 0.0, upper: float = 1.0) -> Floats:
    """∫ of(t) dt of a polynomial of degree 15."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    parts = [w * of(lower + (upper - lower) * (x + 1) / 2) for x, w in zip(nodes, weights)]
    return np.asarray(sum(parts)) * (upper - lower) / 2


def rate(t: float) -> float:
    return EPSILON + (1 - EPSILON) * t


def over_masked(count: Floats) -> Floats:
    return 1 / np.maximum(count, 1)


BERNOULLI = {  # ∫ E[Σ_M ℓ · …] dt
    "masked": lambda: integral(lambda t: toy().bernoulli(rate(t), over_masked)) / N,
    "length": lambda: integral(lambda t: toy().bernoulli(rate(t), np.ones_like)) / (N * P),
    "tokens": lambda: integral(lambda t: toy().bernoulli(rate(t), np.ones_like)) / TOKENS,
    "elbo": lambda: integral(lambda t: toy().bernoulli(rate(t), np.ones_like) / rate(t)) / (N * P),
}
COUNTED = {  # with M uniform on 1 … P
    "masked": lambda: toy().bound / (N * P),
    "length": lambda: toy().by_count[1:].mean(0) / (N * P),
    "tokens": lambda: toy().by_count[1:].mean(0) / TOKENS,
    "elbo": lambda: toy().bound / (N * P),
}
DEFINITIONS = {"bernoulli": BERNOULLI, "exact_count": COUNTED}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("masking", "normalize"), list(itertools.product(DEFINITIONS, COUNTED)))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masked_rows(sampler: str, masking: str, normalize: str, level: str) -> None:
    """P-POTS changes nothing: n, or at sequence level c, has 1/p(t)."""
    if (level, normalize) == ("sequence", "tokens"):
        return
    rl, diffusion = settings({"masking": masking}, normalize=normalize, importance_sampling_level=level)
    expected = DEFINITIONS[masking][normalize]()
    np.testing.assert_allclose(mean(rl, diffusion, SAMPLERS[sampler]), expected, rtol=1e-10, atol=1e-13)


def test_unigrpos_mean_is_the_bound_over_p_plus_1_without_exact_counts() -> None:
    """As epsilon goes to 0: E[(1/|M|) Σ_M ℓ] = B/(P + 1) for uniform t, an empty mask being 0."""
    limit = integral(lambda t: toy().bernoulli(t, over_masked))
    np.testing.assert_allclose(limit, toy().bound / (P + 1), rtol=1e-12)
    np.testing.assert_allclose(
        integral(lambda t: toy().bernoulli(t, lambda count: np.minimum(count, 1) / max(t, 1e-300))),
        toy().bound,
        rtol=1e-12,
    )


@pytest.mark.parametrize("normalize", ["masked", "elbo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mirrored_rows_of_exact_counts_have_the_mean_of_one(level: str, normalize: str) -> None:
    """Where they overlap, too, and a token's value is the mean of its two."""
    rl, diffusion = settings(
        {"masking": "exact_count", "views": 2}, normalize=normalize, importance_sampling_level=level
    )
    np.testing.assert_allclose(mean(rl, diffusion, STEEP), COUNTED[normalize](), rtol=1e-10)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("masking", DEFINITIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_elbo_is_the_bound(sampler: str, masking: str, views: int) -> None:
    rl, diffusion = settings(
        {"masking": masking, "views": views}, estimator="elbo", importance_sampling_level="sequence"
    )
    np.testing.assert_allclose(mean(rl, diffusion, SAMPLERS[sampler]), DEFINITIONS[masking]["elbo"](), rtol=1e-10)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("estimator", ["masked", "elbo"])
def test_complementary_counts_are_exactly_the_bound(estimator: str, sampler: str) -> None:
    """Either row may be empty; M is uniform on 0 … P, and a token weighs (P + 1)/M."""
    rl, diffusion = settings(
        {"masking": "exact_count", "views": 2},
        estimator=estimator,
        normalize="elbo" if estimator == "masked" else "length",
        importance_sampling_level="sequence" if estimator == "elbo" else "token",
        partner="complement",
    )
    np.testing.assert_allclose(mean(rl, diffusion, SAMPLERS[sampler]), toy().bound / (N * P), rtol=1e-10)


def test_complementary_bernoulli_rows_are_the_bound_but_for_the_ends() -> None:
    """Rates are at least 1/(P + 1) from the ends: there ∫ f(t) dt is a rectangle. How far it is from the bound without
    epsilon and without that."""
    rl, diffusion = settings({"views": 2}, estimator="elbo", importance_sampling_level="sequence", partner="complement")
    end = 1 / (P + 1)

    def of(t: float) -> Floats:
        rows = [toy().bernoulli(q, np.ones_like) / q for q in (rate(t), 1 - rate(t))]
        return np.asarray(sum(rows)) / 2

    expected = integral(of, end, 1 - end) + end * (of(end) + of(1 - end))
    np.testing.assert_allclose(mean(rl, diffusion, STEEP) * N * P, expected, rtol=1e-10)
    assert abs(expected[0] / toy().bound[0] - 1) < 0.02


def test_without_importance_weight_the_objective_is_another() -> None:
    """∫ p f dt in place of ∫ f dt (the paper's A.9 to the letter)."""
    rl, diffusion = settings({"masking": "exact_count"}, importance_weight=False)
    share = np.diff(np.interp(np.arange(P + 1) / P, np.linspace(0, 1, 5), STEEP.cumulative))
    counts = np.arange(1, P + 1)[:, None]
    literal = (share[:, None] * toy().by_count[1:] / counts).sum(0) / N
    np.testing.assert_allclose(mean(rl, diffusion, STEEP), literal, rtol=1e-10)
    weighted = COUNTED["masked"]()
    assert np.linalg.norm(literal - weighted) > 0.005 * np.linalg.norm(weighted)


@pytest.mark.parametrize("normalize", ["length", "tokens"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("masking", DEFINITIONS)
def test_one_step_is_the_fully_masked_completion_after_a_partly_masked_prompt(
    masking: str, views: int, normalize: str
) -> None:
    share = 0.3  # of 2 tokens: 1 where it is counted
    this = toy()
    rl, diffusion = settings(
        {"masking": masking, "views": views}, estimator="one_step", mask_prompt=share, normalize=normalize
    )
    noise = noise_of(rl, diffusion)
    numbers = bernoulli_numbers(2, [share, 1 - share]) if masking == "bernoulli" else ordered_numbers(2)
    one = np.ones(1)
    got = sum(weight * trained(rl, this)(noise.rows_of([values], this.shape, one, one)) for values, weight in numbers)
    full = np.ones((4, P), dtype=bool)
    of_prompts = this.of(np.concatenate([all_masks(2), full], axis=1)).sum(1)
    probability = {"bernoulli": [0.49, 0.21, 0.21, 0.09], "exact_count": [0, 0.5, 0.5, 0]}[masking]
    expected = ADVANTAGE * np.array(probability) @ of_prompts / {"length": N * P, "tokens": TOKENS}[normalize]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("full_pass", [False, True])
@pytest.mark.parametrize("pair_weight", ["none", "rate"])
@pytest.mark.parametrize("masking", DEFINITIONS)
def test_coupled_rows(masking: str, pair_weight: str, full_pass: bool) -> None:
    """Each token in the one row that masks it, rates in [0.2, 0.8], under P-POTS."""
    rl, diffusion = settings(
        {"masking": masking, "views": 2},
        estimator="coupled",
        full_pass=full_pass,
        pair_weight=pair_weight,
        rate_range=(0.2, 0.8),
    )
    by_rate = pair_weight == "rate"
    if masking == "bernoulli":

        def of(t: float) -> Floats:
            rows = [toy().bernoulli(q, np.ones_like) / (q if by_rate else 1) for q in (rate(t), 1 - rate(t))]
            return np.asarray(sum(rows))

        pair = integral(of, 0.2, 0.8) / 0.6
    else:
        of_count = np.diff(np.clip(np.arange(P + 2) / (P + 1), 0.2, 0.8)) / 0.6  # of M = ⌊t (P + 1)⌋
        counts = np.maximum(np.arange(P + 1), 1)[:, None]
        row = toy().by_count * ((P + 1) / counts if by_rate else 1)
        pair = of_count @ row + of_count[::-1] @ row
    expected = (pair + toy().totals[-1]) / 2 if full_pass else pair
    np.testing.assert_allclose(mean(rl, diffusion, STEEP), expected / (N * P), rtol=1e-10)


def test_quadrature_is_its_rule_and_exact_for_counts_as_a_polynomial_would_be() -> None:
    """GDPO: one mask of ⌊tP⌋ + 1 tokens at each node."""
    rl, diffusion = settings(
        {"masking": "exact_count", "multisample": 3},
        estimator="elbo",
        importance_sampling_level="sequence",
        times="quadrature",
    )
    noise = noise_of(rl, diffusion)
    t, weight = (values[0, 0] for values in noise.times(0))
    nodes, weights = np.polynomial.legendre.leggauss(3)
    np.testing.assert_allclose(t, (nodes + 1) / 2)
    assert weight.mean() == pytest.approx(1.0)
    got = sum(
        share * trained(rl, toy())(noise.rows_of([numbers] * 3, toy().shape, t, weight))
        for numbers, share in ordered_numbers(P)
    )
    counts = np.floor(t * P).astype(int) + 1
    rule = (weights / 2) @ (toy().by_count[counts] * (P / counts)[:, None])
    np.testing.assert_allclose(got, ADVANTAGE * rule / (N * P), rtol=1e-12)
    assert (gauss_legendre(4).weights * gauss_legendre(4).nodes ** 7).mean() == pytest.approx(1 / 8)


def test_two_independent_masks_average_a_token_over_those_that_mask_it() -> None:
    """P = 3, all pairs of masks of one count; the mean over tokens that either masks."""
    rl, diffusion = settings({"masking": "exact_count", "multisample": 2})
    this, size = toy(3), 3
    noise = noise_of(rl, diffusion)
    got: Any = 0.0
    expected: Any = 0.0
    for count in (1, 2, 3):
        t = np.full(2, (count - 0.5) / size)
        for (first, p), (second, q) in itertools.product(ordered_numbers(size), repeat=2):
            rows = noise.rows_of([first, second], this.shape, t, np.ones(2))
            got = got + p * q / size * trained(rl, this)(rows)
        masks = [set(chosen) for chosen in itertools.combinations(range(size), count)]
        for first, second in itertools.product(masks, repeat=2):
            by_token = [
                np.mean([_of(this, mask)[token] for mask in (first, second) if token in mask], axis=0)
                for token in first | second
            ]
            expected = expected + np.mean(by_token, axis=0) / len(masks) ** 2 / size
    np.testing.assert_allclose(got, ADVANTAGE * expected / N, rtol=1e-12)


def _of(this: Toy, mask: set[int]) -> Floats:
    masked = np.isin(np.arange(-2, this.num_scored), list(mask))[None]
    return this.of(masked)[0]


def test_split_divergence_is_unbiased_and_the_plain_one_rewards_low_variance() -> None:
    """E of k2_split's gradient is that of δ²/2, δ the difference of the bounds; k2's has ½ ∇Var δ̂ besides. Over two
    rows, each of its own rate and mask, P = 3."""
    size = 3
    this, reference = toy(size), toy(size, policy=1)
    one = settings({"masking": "exact_count"}, estimator="elbo", importance_sampling_level="sequence")
    single = noise_of(*one)
    draws = [
        (numbers, (count - 0.5) / size, share / size) for count in (1, 2, 3) for numbers, share in ordered_numbers(size)
    ]
    moments: Any = 0.0
    for numbers, t, share in draws:
        rows = single.rows_of([numbers], this.shape, np.array([t]), np.ones(1))
        constants = coefficients(one[0], rows, TOTALS)
        theirs = (reference.of(rows.masked)[:, :, 0] * constants.c).sum()
        mine = np.einsum("kp,kpn->n", constants.c, this.of(rows.masked))
        moments = moments + share * (mine[0] - theirs) * mine[1:]
    exact = (this.bound[0] - reference.bound[0]) * this.bound[1:]
    spread = (moments - exact) / 2  # ½ ∇Var of the mean of two rows: a half of ½ ∇Var of one

    def mean_of(kl: str) -> Floats:
        rl, diffusion = settings(
            {"masking": "exact_count", "multisample": 2},
            estimator="elbo",
            importance_sampling_level="sequence",
            kl=kl,
            beta=0.5,
        )
        noise = noise_of(rl, diffusion)
        total: Any = 0.0
        for (first, t1, p), (second, t2, q) in itertools.product(draws, repeat=2):
            rows = noise.rows_of([first, second], this.shape, np.array([t1, t2]), np.ones(2))
            constants = coefficients(rl, rows, TOTALS)
            table = this.of(rows.masked)
            log_probs = table[:, :, 0] * rows.scored
            theirs = values(constants, reference.of(rows.masked)[:, :, 0] * rows.scored)
            weight = gradient(rl, constants, log_probs, values(constants, log_probs), theirs, 0.0).weight
            total = total + p * q * np.einsum("kp,kpn->n", weight, table[:, :, 1:])
        return np.asarray(total) * -N * size / rl.beta

    np.testing.assert_allclose(mean_of("k2_split"), exact, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean_of("k2"), exact + spread, rtol=1e-9, atol=1e-12)
    assert np.linalg.norm(spread) > 1e-3 * np.linalg.norm(exact)
