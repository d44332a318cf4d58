"""EMA: the adjusted loss varies less where bins of t differ, and its state restores it."""

from __future__ import annotations

import json

import numpy as np

from megatron_mdm.diffusion.control_variate import BinwiseControlVariate


def losses(generator: np.random.Generator, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Heteroscedastic: level and noise rise with t; the level falls as a model learns (`drift`)."""
    t = generator.random(64)
    return t, (1.0 + 4.0 * t) * drift + 0.3 * t * generator.normal(size=64)


def test_adjusted_loss_varies_less_on_heteroscedastic_data() -> None:
    generator, variate = np.random.default_rng(0), BinwiseControlVariate.new(10, 0.05)
    plain, adjusted = [], []
    for step in range(600):
        t, loss = losses(generator, 2.0 - step / 600)
        if step >= 300:
            plain.append(loss)
            adjusted.append(variate.adjusted(t, loss))
        variate.update(t, loss)
    assert np.var(adjusted) < 0.7 * np.var(plain)


def test_nothing_is_subtracted_before_anything_was_seen() -> None:
    t, loss = losses(np.random.default_rng(1), 1.0)
    np.testing.assert_array_equal(BinwiseControlVariate.new(10, 0.01).adjusted(t, loss), loss)


def test_state_restores_it() -> None:
    generator, variate = np.random.default_rng(0), BinwiseControlVariate.new(4, 0.1)
    for _ in range(20):
        variate.update(*losses(generator, 1.0))
    again = BinwiseControlVariate(**json.loads(json.dumps(variate.state())))
    t, loss = losses(generator, 1.0)
    np.testing.assert_array_equal(again.adjusted(t, loss), variate.adjusted(t, loss))


def test_averages_follow_the_recursion() -> None:
    """One bin, two steps, by hand: μ_L, μ_H, M_LH, M_HH and b move by α towards l, b, l·b, b², l."""
    variate, t = BinwiseControlVariate.new(1, 0.5), np.array([0.2, 0.7])
    variate.update(t, np.array([1.0, 3.0]))
    assert (variate.loss, variate.baseline_mean, variate.baseline) == ([1.0], [0.0], [1.0])
    variate.update(t, np.array([4.0, 4.0]))
    assert (variate.loss, variate.baseline_mean, variate.product, variate.square) == ([2.5], [0.5], [2.0], [0.5])
    assert variate.baseline == [2.5]
