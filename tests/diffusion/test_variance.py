"""Online variance estimates against direct computation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_mdm.diffusion.variance import OnlineVariance


def test_estimator_variance_is_the_sample_variance() -> None:
    generator = np.random.default_rng(0)
    weight, loss = generator.random(500) + 0.5, generator.random(500)
    online = OnlineVariance()
    for start in range(0, 500, 50):
        online.update(weight[start : start + 50], loss[start : start + 50])
    assert online.of_estimator() == pytest.approx((weight * loss).var(ddof=1))


def test_loss_variance_is_corrected_for_the_sampler() -> None:
    """t ~ p(t) = 2t, l = t with weight 1/p: the estimate is Var_{U[0,1]}(t) = 1/12, not the variance under p."""
    generator = np.random.default_rng(1)
    estimates = []
    for _ in range(400):
        t = np.sqrt(generator.random(400))
        online = OnlineVariance()
        online.update(1.0 / (2.0 * t), t)
        estimates.append(online.of_loss())
    error = np.std(estimates) / 20.0
    assert abs(np.mean(estimates) - 1 / 12) < 4 * error


def test_uniform_weights_give_the_plain_variance_in_both() -> None:
    loss = np.random.default_rng(2).random(100)
    online = OnlineVariance()
    online.update(np.ones(100), loss)
    assert online.of_loss() == pytest.approx(loss.var(ddof=1))
    assert online.of_estimator() == pytest.approx(loss.var(ddof=1))


def test_state_survives_json() -> None:
    online = OnlineVariance()
    online.update(np.ones(3), np.array([1.0, 2.0, 4.0]))
    again = OnlineVariance(**json.loads(json.dumps(online.state())))
    assert again == online
    assert np.isnan(OnlineVariance().of_loss())
