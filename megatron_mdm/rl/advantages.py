"""Advantages: what a completion's reward is better than its group's, by `rl.baseline` and `rl.scale_rewards`."""

from __future__ import annotations

import numpy as np

from megatron_mdm.config.schema import RlConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import Bools

SOFTENER = 1e-4  # added to standard deviations, as TRL does


def advantages(rl: RlConfig, rewards: Floats, truncated: Bools) -> Floats:
    """rewards, truncated [B, G] → A [B, G].

    A = (r − mean of the group) / (1, the group's or the batch's sample standard deviation + 1e-4); leave_one_out
    subtracts the mean of the others, G/(G − 1) as much. Exactly 0 in groups of equal rewards. With
    mask_truncated_completions A is 0 for completions without an end, and the group consists of the others alone (in
    TRL they still count in the mean): so the advantages that are trained on add up to 0. One alone has nothing to be
    compared with: 0.
    """
    counted = ~truncated if rl.mask_truncated_completions else np.ones_like(truncated)
    number = counted.sum(1, keepdims=True).astype(np.float64)
    mean = _ratio((rewards * counted).sum(1, keepdims=True), number)
    low = np.where(counted, rewards, np.inf).min(1, keepdims=True)
    high = np.where(counted, rewards, -np.inf).max(1, keepdims=True)
    difference = np.where(counted & (low < high), rewards - mean, 0.0)
    if rl.baseline == "leave_one_out":
        difference = difference * _ratio(number, number - 1.0)
    return difference / _SCALES[rl.scale_rewards](rewards, counted)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return numerator / np.maximum(denominator, 1.0)


def _of_groups(rewards: Floats, counted: Bools) -> Floats:
    number = counted.sum(1, keepdims=True).astype(np.float64)
    mean = _ratio((rewards * counted).sum(1, keepdims=True), number)
    squares = (np.square(rewards - mean) * counted).sum(1, keepdims=True)
    return np.sqrt(_ratio(squares, number - 1.0)) + SOFTENER


def _of_batch(rewards: Floats, counted: Bools) -> Floats:
    return np.asarray(rewards[counted].std(ddof=1) if counted.sum() > 1 else 0.0) + SOFTENER


_SCALES = {"none": lambda rewards, counted: np.ones(1), "group": _of_groups, "batch": _of_batch}
