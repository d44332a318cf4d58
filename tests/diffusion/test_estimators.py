"""Every training estimator against exact enumeration over all masks and quadrature over t."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_mdm.diffusion.masking import MASKING_RULES
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, TSampler, UniformSampler
from tests.diffusion.toy import SCHEDULE, P, Toy, clean_batch, exact_mean, exact_variance

GLOBAL_SIZE, NUM_STEPS = 16, 1500
SAMPLERS: dict[str, TSampler] = {
    "uniform": UniformSampler(),
    "steep": TabulatedSampler.of(lambda t: 1.0 / (0.02 + t), 0.02),
    "rising": TabulatedSampler.of(lambda t: 0.1 + t**3, 0.02),
}


def noiser(sampler: TSampler, views: int, num_strata: int, rule: str = "bernoulli") -> Noiser:
    return Noiser(
        schedule=SCHEDULE,
        sampler=sampler,
        rule=MASKING_RULES[rule],
        views=views,
        num_strata=num_strata,
        global_size=GLOBAL_SIZE,
        mask_id=9,
        seed=3,
    )


def estimates(toy: Toy, make_noise: Noiser) -> np.ndarray:
    """w·l of every sample [steps, n]; the toy's samples take turns."""
    batch = clean_batch(GLOBAL_SIZE)
    which = np.arange(GLOBAL_SIZE) % len(toy.tables)
    result = []
    for step in range(NUM_STEPS):
        noised = make_noise(batch, step)
        result.append(noised.sample_weight.numpy() * toy.losses(noised, which))
    return np.array(result)


@pytest.mark.parametrize(
    ("sampler", "views", "num_strata"), list(itertools.product(SAMPLERS, [1, 2], [1, 4, GLOBAL_SIZE]))
)
def test_estimator_is_unbiased(sampler: str, views: int, num_strata: int) -> None:
    toy = Toy()
    steps = estimates(toy, noiser(SAMPLERS[sampler], views, num_strata)).mean(1)  # independent over steps
    error = steps.std(ddof=1) / np.sqrt(len(steps))
    assert abs(steps.mean() - exact_mean(toy)) < 4 * error


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variance_of_importance_sampling_is_the_integral(sampler: str) -> None:
    toy = Toy()
    values = estimates(toy, noiser(SAMPLERS[sampler], 1, 1)).ravel()
    squares = (values - values.mean()) ** 2
    error = squares.std(ddof=1) / np.sqrt(len(squares))
    assert abs(squares.mean() - exact_variance(toy, SAMPLERS[sampler])) < 4 * error


def test_exact_optimum_reaches_the_minimal_variance() -> None:
    toy = Toy()
    t = (np.arange(4096) + 0.5) / 4096
    _, square = toy.enumerate(t)
    optimal = TabulatedSampler(np.sqrt(square))
    minimum = np.sqrt(square).mean() ** 2 - exact_mean(toy) ** 2
    assert exact_variance(toy, optimal) == pytest.approx(minimum, rel=0.02)
    assert minimum < exact_variance(toy, UniformSampler())


@pytest.mark.parametrize("views", [1, 2])
def test_stratification_reduces_variance(views: int) -> None:
    toy = Toy()
    variances = [estimates(toy, noiser(UniformSampler(), views, k)).mean(1).var() for k in (1, GLOBAL_SIZE)]
    assert variances[1] < variances[0]


def test_complementary_views_reduce_masking_noise_at_equal_views() -> None:
    """MIRROR = (1 + ρ)/2 of one view, with ρ < 0 on this toy, so below 1/2."""
    toy = Toy(num_samples=1)
    single = estimates(toy, noiser(UniformSampler(), 1, GLOBAL_SIZE)).mean(1).var()
    pair = estimates(toy, noiser(UniformSampler(), 2, GLOBAL_SIZE)).mean(1).var()
    assert pair < 0.5 * single


def test_noise_is_a_function_of_step_and_position_alone() -> None:
    """The same whether the global batch comes whole or in micro-batches, in any order, before or after other steps."""
    make_noise = noiser(SAMPLERS["steep"], 2, 4)
    whole = make_noise(clean_batch(GLOBAL_SIZE), 7)
    batch = clean_batch(GLOBAL_SIZE)
    again = noiser(SAMPLERS["steep"], 2, 4)
    again(batch, 3)
    for rows in ([5, 2], [0, 15, 9]):
        part = type(batch)(*(getattr(batch, name)[rows] for name in batch.__dataclass_fields__))
        noised = again(part, 7)
        views = whole.masked.view(2, GLOBAL_SIZE, P)
        assert (noised.masked.view(2, len(rows), P) == views[:, rows]).all()
        assert (noised.t == whole.t[rows]).all()
        assert (noised.sample_weight == whole.sample_weight[rows]).all()
