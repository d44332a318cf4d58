"""Densities, quantiles, weights and strata of t."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_mdm.diffusion.t_samplers import (
    FULL_RANGE,
    NUM_CELLS,
    T_SAMPLERS,
    SamplerInputs,
    TabulatedSampler,
    clipping_candidates,
    least_variance_interval,
    number_of_strata,
    stratified_quantiles,
)

DENSITY = np.linspace(0.2, 3.0, NUM_CELLS) ** 2


INPUTS = SamplerInputs(DENSITY, (0.25, 0.75))


@pytest.mark.parametrize("name", T_SAMPLERS)
def test_quantile_follows_the_density(name: str) -> None:
    sampler = T_SAMPLERS[name](INPUTS)
    u = (np.arange(200_000) + 0.5) / 200_000
    t, weight = sampler.quantile(u)
    assert (np.diff(t) > 0).all()
    if name != "clipped":  # which is biased, and says so
        np.testing.assert_allclose(weight, 1.0 / sampler.density(t), rtol=1e-12)
    counts, _ = np.histogram(t, bins=64, range=(0, 1))
    edges = np.linspace(0, 1, 64 * 64 + 1)
    mass = sampler.density((edges[:-1] + edges[1:]) / 2).reshape(64, 64).mean(1)
    np.testing.assert_allclose(counts / len(u) * 64, mass, rtol=2e-3, atol=2 * 64 / len(u))  # a count is whole


@pytest.mark.parametrize("name", T_SAMPLERS)
def test_weights_integrate_to_one(name: str) -> None:
    """E_p[1/p] = ∫ dt = 1, exactly for a stratified u: the whole of [0, 1] is reached."""
    sampler = T_SAMPLERS[name](INPUTS)
    _, weight = sampler.quantile((np.arange(1_000_000) + 0.5) / 1_000_000)
    assert weight.mean() == pytest.approx(1.0, rel=1e-4)


def test_extreme_quantiles_stay_inside() -> None:
    sampler = TabulatedSampler(DENSITY)
    t, weight = sampler.quantile(np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert 0.0 <= t[0] <= t[1] <= 1.0
    assert np.isfinite(weight).all()


def test_uniform_floor_bounds_the_weights() -> None:
    sampler = TabulatedSampler.of(lambda t: np.exp(-200.0 * t), 0.02)
    assert (1.0 / sampler.cell_density).max() <= 50.0 + 1e-9


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, 0.0], [1.0, np.nan], [[1.0]]])
def test_bad_tables_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        TabulatedSampler(np.array(bad))


@pytest.mark.parametrize(("global_size", "num_strata"), [(32, 6), (16, 16), (10, 3), (7, 1), (5, 5)])
def test_strata_are_filled_evenly(global_size: int, num_strata: int) -> None:
    for step in range(50):
        u = stratified_quantiles(1, step, global_size, num_strata)
        counts = np.bincount((u * num_strata).astype(int), minlength=num_strata)
        base = global_size // num_strata
        assert set(counts) <= {base, base + 1}
        assert len(u) == global_size
        assert (u < 1.0).all()


def test_every_position_is_marginally_uniform() -> None:
    """Leftover strata and permutations are random: with n = 10, K = 4, each position's u is U[0, 1]."""
    draws = np.stack([stratified_quantiles(5, step, 10, 4) for step in range(4000)])
    for position in range(10):
        assert stats.kstest(draws[:, position], "uniform").pvalue > 1e-4


def test_number_of_strata() -> None:
    assert number_of_strata("sqrt", 32) == 6  # the paper's
    assert number_of_strata("full", 32) == 32
    assert number_of_strata("none", 32) == 1
    assert number_of_strata(5, 32) == 5


def test_clipping_candidates_are_those_of_the_method() -> None:
    candidates = clipping_candidates()
    assert candidates[0] == FULL_RANGE
    assert len(candidates) == 1 + 11 + 9 + 7 + 5 + 3
    assert all(0.0 < low < high <= 1.0 + 1e-9 for low, high in candidates)


def test_adaptive_clipping_takes_the_quietest_interval() -> None:
    t = (np.arange(4000) + 0.5) / 4000
    noise = np.random.default_rng(0).normal(size=4000) * np.where((t > 0.25) & (t < 0.85), 0.1, 3.0)
    low, high = least_variance_interval(t, 1.0 + noise)
    assert low >= 0.25 - 1e-9
    assert high <= 0.85 + 1e-9
