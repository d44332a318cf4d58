"""Masking rules: marginals, the relation of two views, ISAD."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import DiffusionConfig
from megatron_mdm.diffusion.mask_schedule import MASK_SCHEDULES, CosineSchedule, LinearSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from tests.diffusion.toy import draw

SCHEDULE = LinearSchedule(1e-3)


NOTHING = np.zeros(5, dtype=bool)


@pytest.mark.parametrize("name", MASK_SCHEDULES)
def test_schedules_grow_from_about_nothing_to_all(name: str) -> None:
    """Every one of the table can be named; p_mask(0) > 0, by which losses are divided."""
    assert name in get_args(DiffusionConfig.model_fields["mask_schedule"].annotation)
    q = MASK_SCHEDULES[name](1e-3).mask_probability(np.linspace(0.0, 1.0, 1001))
    assert 0.0 < q[0] < 0.01
    assert q[-1] == pytest.approx(1.0, abs=1e-12)
    assert (np.diff(q) > 0.0).all()


@pytest.mark.parametrize("t", [0.0, 0.1, 0.45, 0.8, 1.0])
@pytest.mark.parametrize("shift", [0.0, 0.2])
@pytest.mark.parametrize("rule", MASKING_RULES)
def test_marginal_probability_times_weight_is_one(rule: str, shift: float, t: float) -> None:
    """E[1(masked) / q] = 1 for every position and view: each token's loss counts once, delimiters' (ISAD) too."""
    repeats = 50
    design = MaskDesign(MASKING_RULES[rule], SCHEDULE, complementary=True, repeats=repeats, delimiter_shift=shift)
    generator = np.random.default_rng(0)
    delimiters = np.array([False, True, False, False, True]) & (shift > 0)
    total = np.zeros((2, 5))
    squares = np.zeros((2, 5))
    num = 20_000
    for _ in range(num // repeats):
        masking = draw(design, generator, t, delimiters)
        value = (masking.masked / masking.probability).reshape(repeats, 2, 5)
        total += value.sum(0)
        squares += (value**2).sum(0)
    mean = total / num
    error = np.sqrt(np.maximum(squares / num - mean**2, 1e-12) / num)
    assert (np.abs(mean - 1.0) <= 4.5 * error + 1e-9).all()


def test_isad_masks_delimiters_more_often() -> None:
    design = MaskDesign(MASKING_RULES["bernoulli"], SCHEDULE, delimiter_shift=0.2)
    delimiters = np.array([False, True, False])
    q = draw(design, np.random.default_rng(0), 0.3, delimiters).probability
    assert q == pytest.approx(SCHEDULE.mask_probability(np.full(3, 0.3)) + 0.2 * delimiters)
    assert draw(design, np.random.default_rng(0), 0.95, delimiters).probability[1] == 1.0


@pytest.mark.parametrize("rule", MASKING_RULES)
def test_views_are_complementary(rule: str) -> None:
    uniforms = np.random.default_rng(1).random(1000)
    below = MASKING_RULES[rule].draw(uniforms, 0.3)
    assert not (below[0] & below[1]).any()
    above = MASKING_RULES[rule].draw(uniforms, 0.7)
    assert (above[0] | above[1]).all()


def test_repeats_are_independent_and_views_come_in_pairs() -> None:
    design = MaskDesign(MASKING_RULES["bernoulli"], SCHEDULE, complementary=True, repeats=2)
    masked = draw(design, np.random.default_rng(0), 0.4, np.zeros(1000, dtype=bool)).masked
    assert masked.shape == (4, 1000) == (design.views, 1000)
    overlap = {(i, j): int((masked[i] & masked[j]).sum()) for i in range(4) for j in range(i)}
    assert overlap[1, 0] == overlap[3, 2] == 0  # complementary below 1/2
    assert all(overlap[pair] > 100 for pair in ((2, 0), (2, 1), (3, 0), (3, 1)))


def test_exact_count_masks_the_share_that_t_says() -> None:
    design = MaskDesign(MASKING_RULES["exact_count"], SCHEDULE)
    counts = [int(draw(design, np.random.default_rng(0), t, NOTHING).masked.sum()) for t in (0.0, 0.19, 0.2, 0.99, 1.0)]
    assert counts == [1, 1, 2, 5, 5]


def test_rounded_count_is_mmadas() -> None:
    """(N · cos(π u / 2)).round().clamp(min=1), in torch; ε is not in it; u = 1 − t is as uniform as t."""
    t = np.random.default_rng(0).random(2000)
    for size in (1, 2, 5, 16, 256, 1024):
        rate = torch.cos(torch.from_numpy(1.0 - t) * np.pi * 0.5)
        expected = (size * rate).round().clamp(min=1).long()
        (q, _) = MaskDesign(MASKING_RULES["rounded_count"], CosineSchedule(1e-3)).probabilities(
            t, np.full(len(t), float(size)), np.zeros(len(t))
        )
        assert np.rint(q * size).astype(int).tolist() == expected.tolist()
    assert CosineSchedule(1e-3).rate(np.linspace(0, 1, 10001)).mean() == pytest.approx(2 / np.pi, abs=1e-4)


@pytest.mark.parametrize("rule", ["exact_count", "rounded_count"])
def test_counts_follow_the_schedule(rule: str) -> None:
    t = np.linspace(0.0, 1.0, 41)
    shares = {
        name: MASKING_RULES[rule].probability(t, np.float64(100.0), schedule(1e-3))
        for name, schedule in MASK_SCHEDULES.items()
    }
    assert (np.abs(shares["linear"] - t) <= 0.01 + 1e-9).all()
    assert (np.abs(shares["cosine"] - np.sin(np.pi / 2 * t)) <= 0.01 + 1e-9).all()


def test_epsilon_bounds_the_weight() -> None:
    assert SCHEDULE.mask_probability(np.array([0.0, 1.0])).tolist() == [1e-3, 1.0]
