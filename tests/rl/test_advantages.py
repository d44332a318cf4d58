"""Advantages by hand: baselines, scales, ties, truncated completions."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.config.schema import RlConfig
from megatron_mdm.rl.advantages import SOFTENER, advantages

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
NONE = np.zeros(REWARDS.shape, dtype=bool)
TRUNCATED = np.array([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=bool)
GROUP = np.sqrt(np.array([[1 / 3], [1.0], [0.0]]))  # sample standard deviations
DIFFERENCE = np.array([[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("scale", "baseline", "expected"),
    [
        ("none", "mean", DIFFERENCE),
        ("none", "leave_one_out", DIFFERENCE * 4 / 3),
        ("group", "mean", DIFFERENCE / (GROUP + SOFTENER)),
        ("group", "leave_one_out", DIFFERENCE * 4 / 3 / (GROUP + SOFTENER)),
        ("batch", "mean", DIFFERENCE / (REWARDS.std(ddof=1) + SOFTENER)),
    ],
)
def test_table(scale: str, baseline: str, expected: np.ndarray) -> None:
    rl = RlConfig(scale_rewards=scale, baseline=baseline)
    result = advantages(rl, REWARDS, TRUNCATED)  # which count like others
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    assert (result[2] == 0).all()  # exactly, though the mean of 0.1 is not 0.1


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_masked_truncated_completions_are_not_of_the_group(scale: str, baseline: str) -> None:
    """Advantages of the others add up to 0; one alone has none."""
    rl = RlConfig(scale_rewards=scale, baseline=baseline, mask_truncated_completions=True)
    result = advantages(rl, REWARDS, TRUNCATED)
    assert (result[TRUNCATED] == 0).all()
    assert (result[1:] == 0).all()
    three = advantages(RlConfig(scale_rewards="none", baseline=baseline), REWARDS[:1, :3], NONE[:1, :3])
    deviation = {"none": 1.0, "group": REWARDS[0, :3].std(ddof=1) + SOFTENER}.get(
        scale, REWARDS[~TRUNCATED].std(ddof=1) + SOFTENER
    )
    np.testing.assert_allclose(result[0, :3], three[0] / deviation, rtol=1e-12)
    assert abs(result[0].sum()) < 1e-12


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rl = RlConfig(scale_rewards="none", baseline="leave_one_out")
    rewards = np.random.default_rng(0).random((5, 6))
    result = advantages(rl, rewards, np.zeros((5, 6), dtype=bool))
    for group, index in np.ndindex(5, 6):
        others = np.delete(rewards[group], index).mean()
        assert result[group, index] == pytest.approx(rewards[group, index] - others)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_constant_rewards_are_no_advantage_at_all(scale: str) -> None:
    rl = RlConfig(scale_rewards=scale)
    assert not advantages(rl, np.full((3, 4), 0.3), NONE).any()
    everything = advantages(rl.model_copy(update={"mask_truncated_completions": True}), REWARDS, ~NONE)
    assert not everything.any()
