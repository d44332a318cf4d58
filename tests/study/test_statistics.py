"""Intervals against numbers made by hand, and against simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mdm.evaluation.intervals import Interval, mean_interval
from megatron_mdm.study.statistics import (
    contrast,
    mean_rank_correlation,
    proportion_error,
    rank_correlation,
    spread_ratio,
    worst_over_best,
)


def test_mean_of_three_seeds() -> None:
    """50, 52, 57: mean 53, s² = 13, t(0.975, 2) = 4.302653."""
    interval = mean_interval([50.0, 52.0, 57.0])
    assert interval.estimate == 53.0
    assert interval.half_width == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)


def test_one_run_gives_no_interval() -> None:
    assert mean_interval([3.0]) == (3.0, -math.inf, math.inf)
    assert contrast([[3.0], [1.0, 2.0]], [1, -1]) == (1.5, -math.inf, math.inf)
    assert spread_ratio([3.0], [1.0, 2.0]).upper == math.inf


def test_equal_variances_and_sizes_give_students_difference() -> None:
    """Groups 1, 3 and 5, 7: both variances 2; Welch's freedom is 2, t = 4.302653, standard error √(2/2 + 2/2)."""
    interval = contrast([[5.0, 7.0], [1.0, 3.0]], [1.0, -1.0])
    assert interval.estimate == 4.0
    assert interval.half_width == pytest.approx(4.302653 * math.sqrt(2), rel=1e-6)


def test_freedom_of_unequal_variances() -> None:
    """Variances 2 and 0 of two values each: all of the variance is the first group's, of one degree of freedom."""
    interval = contrast([[5.0, 7.0], [1.0, 1.0]], [1.0, -1.0])
    assert interval.half_width == pytest.approx(12.706205 * 1.0, rel=1e-6)


def test_four_groups_synergy() -> None:
    groups = [[10.0, 10.0], [6.0, 6.0], [5.0, 5.0], [4.0, 4.0]]
    assert contrast(groups, [1, -1, -1, 1]) == (3.0, 3.0, 3.0)


def test_ratio_of_spreads() -> None:
    """Variances 8 and 2 of 3 values: ratio 4; F(0.975; 2, 2) = 39."""
    interval = spread_ratio([0.0, 2 * math.sqrt(2), 4 * math.sqrt(2)], [0.0, math.sqrt(2), 2 * math.sqrt(2)])
    assert interval.estimate == pytest.approx(2.0)
    assert interval.lower == pytest.approx(math.sqrt(4 / 39), rel=1e-6)
    assert interval.upper == pytest.approx(math.sqrt(4 * 39), rel=1e-6)


def test_mean_of_rank_correlations() -> None:
    """ρ = 0.9 of five (weight 2) and 1 − 6·4/(7·48) = 0.928571 of seven (weight 4), variances (1 + ρ²/2)/weight."""
    five = ([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])
    seven = ([1, 2, 3, 4, 5, 6, 7], [2, 1, 4, 3, 5, 6, 7])
    found = mean_rank_correlation([five, seven])
    centre = (2 * math.atanh(0.9) + 4 * math.atanh(1 - 24 / 336)) / 6
    error = math.sqrt(4 * 1.405 / 2 + 16 * (1 + (1 - 24 / 336) ** 2 / 2) / 4) / 6
    assert found.estimate == pytest.approx(math.tanh(centre))
    assert found.lower == pytest.approx(math.tanh(centre - 1.959964 * error), rel=1e-6)
    assert mean_rank_correlation([five, ([1, 2], [2, 1])])[1:] == (-1.0, 1.0)


def test_ranks() -> None:
    """One pair of five turned round: ρ = 1 − 6·2/(5·24) = 0.9; atanh 0.9 = 1.472219, its error √(1.405/2)."""
    interval = rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])
    assert interval.estimate == pytest.approx(0.9)
    half = 1.959964 * math.sqrt(1.405 / 2)
    assert interval.lower == pytest.approx(math.tanh(1.472219 - half), rel=1e-5)
    assert rank_correlation([1, 2, 3], [1, 2, 3])[1:] == (-1.0, 1.0)
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]).upper == pytest.approx(1.0)


def test_margin_of_exact_scores_is_exact() -> None:
    assert worst_over_best([5.0, 6.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]) == (1.0, 1.0, 1.0)


def test_margin_widens_with_the_errors() -> None:
    near = worst_over_best([5.0, 6.0], [0.1, 0.1], [3.0, 4.0], [0.1, 0.1])
    far = worst_over_best([5.0, 6.0], [1.0, 1.0], [3.0, 4.0], [1.0, 1.0])
    assert near.lower > 0 > far.lower
    # The margin of one pair far from the others: a difference of two normal numbers.
    single = worst_over_best([5.0], [0.3], [4.0], [0.4])
    # A quantile of 4,000 draws at 2.5 % has an error of some 0.04 σ, σ = 0.5: three of them.
    assert single.lower == pytest.approx(1 - 1.96 * 0.5, abs=0.06)
    assert single.upper == pytest.approx(1 + 1.96 * 0.5, abs=0.06)


@pytest.mark.parametrize(("share", "number"), [(0.5, 1000), (0.0, 1000), (1.0, 100)])
def test_error_of_a_share(share: float, number: int) -> None:
    error = proportion_error(share, number)
    assert 0 < error <= 0.5 / math.sqrt(number)
    if share == 0.5:
        assert error == pytest.approx(0.5 / math.sqrt(1004))


def test_intervals_of_means_cover_what_they_promise() -> None:
    """2,000 studies of three seeds: 95 % ± three standard errors of a share, 1.5 points, hold the true difference."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        first = generator.normal(3.0, 2.0, 3)
        second = generator.normal(1.0, 1.0, 3)
        interval = contrast([first.tolist(), second.tolist()], [1, -1])
        covered += interval.lower <= 2.0 <= interval.upper
    assert 0.935 <= covered / 2000 <= 0.985  # Welch's is known to be a little wide at such sizes


def test_intervals_that_touch_are_not_apart() -> None:
    assert Interval(1, 0, 2).apart_from(Interval(5, 3, 6))
    assert not Interval(1, 0, 2).apart_from(Interval(3, 2, 4))
