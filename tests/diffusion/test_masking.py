"""Masking rules: marginals and the relation of the two views."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.diffusion.mask_schedule import MaskSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES

SCHEDULE = MaskSchedule(1e-3)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.45, 0.8, 1.0])
@pytest.mark.parametrize("rule", MASKING_RULES)
def test_marginal_probability_times_weight_is_one(rule: str, t: float) -> None:
    """E[1(masked) · weight] = 1 for every position and view: each token's loss counts once."""
    generator = np.random.default_rng(0)
    total, squares, num = np.zeros((2, 5)), np.zeros((2, 5)), 40_000
    for _ in range(num):
        masking = MASKING_RULES[rule](generator.random(5), t, SCHEDULE, 2)
        value = masking.masked * masking.token_weight
        total += value
        squares += value**2
    mean = total / num
    error = np.sqrt(np.maximum(squares / num - mean**2, 1e-12) / num)
    assert (np.abs(mean - 1.0) <= 4.5 * error + 1e-9).all()


def test_views_are_complementary() -> None:
    uniforms = np.random.default_rng(1).random(1000)
    below = MASKING_RULES["bernoulli"](uniforms, 0.3, SCHEDULE, 2).masked
    assert not (below[0] & below[1]).any()
    above = MASKING_RULES["bernoulli"](uniforms, 0.7, SCHEDULE, 2).masked
    assert (above[0] | above[1]).all()


def test_epsilon_bounds_the_weight() -> None:
    assert SCHEDULE.mask_probability(np.array([0.0, 1.0])).tolist() == [1e-3, 1.0]
