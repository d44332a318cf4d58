"""EMA: what either variate does to the mean and the variance of the reported loss, and that its state restores it."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from megatron_mdm.diffusion.control_variate import CONTROL_VARIATES, CentredVariate, PaperVariate, WeightedLosses
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import (
    ClippedSampler,
    TabulatedSampler,
    TSampler,
    UniformSampler,
    stratified_quantiles,
)

NUM_BINS = 10
SIZE = 32
SAMPLERS: dict[str, TSampler] = {
    "uniform": UniformSampler(),
    "ppots": TabulatedSampler.of(lambda t: 1.0 / np.sqrt(t), 0.02),
    "clipped": ClippedSampler((0.27, 0.81)),  # no bin's edge
}
LEVELS: dict[str, Callable[[int], float]] = {  # of a run's loss, by step
    "stationary": lambda step: 1.0,
    "drifting": lambda step: 0.2 + 2.0 * 0.997**step,
}


def batch_of(sampler: TSampler, quantiles: Floats, level: float, generator: np.random.Generator) -> WeightedLosses:
    """Losses that rise with t, of mean 2.5 at level 1, and vary as masks do: most where few tokens are masked."""
    t, weight = sampler.quantile(quantiles)
    noise = 0.4 * generator.normal(size=len(t)) / np.sqrt(t + 0.05)
    return WeightedLosses(t, weight, level * (1.0 + 3.0 * t + noise), sampler.weighted_mass(NUM_BINS))


def reported(
    variate: str, sampler: TSampler, level: Callable[[int], float], num_strata: int = 1, steps: int = 1500
) -> tuple[Floats, Floats]:
    """(loss, adjusted loss) of each step of a run after the first 300, in which averages settle."""
    generator = np.random.default_rng(0)
    control = CONTROL_VARIATES[variate].new(NUM_BINS, 0.01)
    results = []
    for step in range(steps):
        quantiles = stratified_quantiles(0, step, SIZE, num_strata)
        batch = batch_of(sampler, quantiles, level(step), generator)
        if step >= 300:
            results.append((float((batch.weight * batch.loss).mean()), float(control.adjusted(batch).mean())))
        control.update(batch)
    loss, adjusted = np.array(results).T
    return loss, adjusted


def spread(values: Floats) -> float:
    """Variance about a moving level."""
    return float(np.square(np.diff(values, 2)).mean() / 6.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("sampler", "num_strata"), [*((name, 1) for name in SAMPLERS), ("ppots", 6)])
def test_the_centred_variate_keeps_the_mean_and_lowers_the_variance(sampler: str, num_strata: int, level: str) -> None:
    loss, adjusted = reported("centred", SAMPLERS[sampler], LEVELS[level], num_strata)
    difference = adjusted - loss
    error = difference.std() / len(difference) ** 0.5
    assert abs(difference.mean()) < 4.0 * error
    assert error < 0.01 * loss.mean()
    assert spread(adjusted) < spread(loss)


def test_it_takes_off_what_the_rate_explains() -> None:
    """Uniform t: the mean's variance over bins, 9/12 less what varies within them, of 9/12 and the masks' 0.49."""
    loss, adjusted = reported("centred", UniformSampler(), LEVELS["stationary"], steps=3000)
    rate = 9.0 / 12.0
    within = 9.0 / 12.0 / NUM_BINS**2
    masks = 0.16 * float(np.log(1.05 / 0.05))
    expected = (masks + within) / (masks + rate)
    assert spread(adjusted) / spread(loss) == pytest.approx(expected, rel=4 * 2 / len(loss) ** 0.5)


def test_the_papers_variate_moves_the_mean() -> None:
    """What the configuration says of it, and why it is not the default: c·b is not centred."""
    loss, adjusted = reported("paper", UniformSampler(), LEVELS["stationary"], steps=3000)
    assert abs(adjusted.mean() / loss.mean() - 1.0) > 0.5
    assert spread(adjusted) > spread(loss)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weighted_mass_is_an_expectation(name: str) -> None:
    quantiles = (np.arange(200000) + 0.5) / 200000
    t, weight = SAMPLERS[name].quantile(quantiles)
    bins = np.minimum((t * NUM_BINS).astype(int), NUM_BINS - 1)
    expected = np.bincount(bins, weight, NUM_BINS) / len(t)
    np.testing.assert_allclose(SAMPLERS[name].weighted_mass(NUM_BINS), expected, atol=1e-4)  # a few of 200,000 at edges


def test_one_loss_far_off_the_others_does_no_lasting_harm() -> None:
    """What a loss a thousand times as large does to later batches is forgotten in a few times 1/rate steps."""
    generator = np.random.default_rng(0)
    control = CentredVariate.new(NUM_BINS, 0.01)
    differences = []
    for step in range(1500):
        batch = batch_of(UniformSampler(), generator.random(SIZE), 1.0, generator)
        if step == 200:
            batch.loss[0] *= 1000.0
        if step > 700:
            differences.append(float((control.adjusted(batch) - batch.loss).mean()))
        control.update(batch)
    assert np.std(differences) < 1.2 / SIZE**0.5  # of β(t), whose variance is 9/12, and some noise of its own


@pytest.mark.parametrize("name", CONTROL_VARIATES)
def test_nothing_is_subtracted_before_anything_was_seen(name: str) -> None:
    generator = np.random.default_rng(1)
    batch = batch_of(SAMPLERS["ppots"], generator.random(SIZE), 1.0, generator)
    adjusted = CONTROL_VARIATES[name].new(10, 0.01).adjusted(batch)
    np.testing.assert_array_equal(adjusted, batch.weight * batch.loss)


@pytest.mark.parametrize("name", CONTROL_VARIATES)
def test_state_restores_it(name: str) -> None:
    generator = np.random.default_rng(0)
    variate = CONTROL_VARIATES[name].new(NUM_BINS, 0.1)
    for _ in range(20):
        variate.update(batch_of(UniformSampler(), generator.random(SIZE), 1.0, generator))
    again = CONTROL_VARIATES[name](**json.loads(json.dumps(variate.state())))
    batch = batch_of(UniformSampler(), generator.random(SIZE), 1.0, generator)
    np.testing.assert_array_equal(again.adjusted(batch), variate.adjusted(batch))


def test_where_t_explains_nothing_nothing_is_added() -> None:
    """Losses that do not depend on t, few of them, and averages that forget at once: β is noise, so c becomes small."""
    generator = np.random.default_rng(0)
    control = CentredVariate.new(NUM_BINS, 0.3)
    results = []
    for step in range(2000):
        t = generator.random(4)
        ones = np.ones(4)
        batch = WeightedLosses(t, ones, 2.0 + generator.normal(size=4), UniformSampler().weighted_mass(NUM_BINS))
        if step >= 300:
            results.append((float(batch.loss.mean()), float(control.adjusted(batch).mean())))
        control.update(batch)
    loss, adjusted = np.array(results).T
    assert spread(adjusted) < 1.2 * spread(loss)  # with c = 1, 1.29 times


def test_averages_of_the_centred_variate_by_hand() -> None:
    """Two bins; losses weigh w², those of a batch before half as much: β is 4·1/4 and (1·3 + 4·6)/(1 + 4), then
    (½·27 + 1·8)/(½·5 + 1)."""
    variate = CentredVariate.new(2, 0.5)
    first = WeightedLosses(np.array([0.1, 0.6, 0.9]), np.array([2.0, 1.0, 2.0]), np.array([1.0, 3.0, 6.0]), np.ones(2))
    variate.update(first)
    assert [a / b for a, b in zip(variate.weighted_loss, variate.weight)] == pytest.approx([1.0, 27.0 / 5.0])
    variate.update(WeightedLosses(np.array([0.7]), np.ones(1), np.array([8.0]), np.ones(2)))
    assert [a / b for a, b in zip(variate.weighted_loss, variate.weight)] == pytest.approx([1.0, 21.5 / 3.5])


def test_the_papers_averages_follow_its_recursion() -> None:
    """One bin, two steps, by hand: μ_L, μ_H, M_LH, M_HH and b move by α towards l, b, l·b, b², l."""
    variate = PaperVariate.new(1, 0.5)
    t = np.array([0.2, 0.7])
    ones = np.ones(2)
    variate.update(WeightedLosses(t, ones, np.array([1.0, 3.0]), np.ones(1)))
    assert (variate.loss, variate.baseline_mean, variate.baseline) == ([1.0], [0.0], [1.0])
    variate.update(WeightedLosses(t, ones, np.array([4.0, 4.0]), np.ones(1)))
    assert (variate.loss, variate.baseline_mean, variate.product, variate.square) == ([2.5], [0.5], [2.0], [0.5])
    assert variate.baseline == [2.5]
