"""Online variance estimates against what is known of simulated training."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import stratified_quantiles
from megatron_mdm.diffusion.variance import OnlineVariance

SIZE = 32  # samples of a batch
Batch = tuple[Floats, Floats, Floats]  # weight, loss, term


def simulated(batch: Callable[[int, np.random.Generator], Batch], num_batches: int, seed: int = 0) -> OnlineVariance:
    online = OnlineVariance()
    generator = np.random.default_rng(seed)
    for step in range(num_batches):
        online.update(*batch(step, generator))
    return online


def level(t: Floats) -> Floats:
    """E[l | t]: its variance over uniform t is 3²/12 = 0.75."""
    return 1.0 + 3.0 * t


# variance of the level over t, and of l about it
RATE = 0.75
NOISE = 0.25
TRUTH = RATE + NOISE


def losses(t: Floats, generator: np.random.Generator) -> Floats:
    return level(t) + NOISE**0.5 * generator.normal(size=len(t))


def independent(step: int, generator: np.random.Generator) -> Batch:
    loss = losses(generator.random(SIZE), generator)
    return np.ones(SIZE), loss, loss


def stratified(step: int, generator: np.random.Generator) -> Batch:
    loss = losses(stratified_quantiles(1, step, SIZE, SIZE), generator)
    return np.ones(SIZE), loss, loss


def drifting(step: int, generator: np.random.Generator) -> Batch:
    """A fall of 0.2 a step, 1.1 standard errors of a batch's mean."""
    loss = losses(generator.random(SIZE), generator) - 0.2 * step
    return np.ones(SIZE), loss, loss


def importance(step: int, generator: np.random.Generator) -> Batch:
    """t from p(t) = (1 + 2t)/2, so w l has E[w² l²] = ∫ (level² + noise)/p dt."""
    t = 0.5 * (np.sqrt(1.0 + 8.0 * generator.random(SIZE)) - 1.0)
    weight = 2.0 / (1.0 + 2.0 * t)
    loss = losses(t, generator)
    return weight, loss, weight * loss


T = (np.arange(10000) + 0.5) / 10000
IMPORTANCE = float(((level(T) ** 2 + NOISE) * 2.0 / (1.0 + 2.0 * T)).mean() - 2.5**2)
# batch → variance of l under uniform t, of a term, and n times that of a batch's loss
CASES = {
    independent: (TRUTH, TRUTH, TRUTH),
    # One t in each stratum of width 1/n: what is left of the rate's variance is that within a stratum.
    stratified: (TRUTH, TRUTH * (1.0 + (RATE - RATE / SIZE**2) / TRUTH / (SIZE - 1)), NOISE + RATE / SIZE**2),
    drifting: (TRUTH, TRUTH, TRUTH),
    importance: (TRUTH, IMPORTANCE, IMPORTANCE),
}


@pytest.mark.parametrize("batch", CASES, ids=lambda batch: batch.__name__)
def test_estimates_agree_with_the_truth(batch: Callable[[int, np.random.Generator], Batch]) -> None:
    """Over windows of 10 batches, going on from each other; means within 4 standard errors of the windows' spread."""
    online = OnlineVariance()
    generator = np.random.default_rng(0)
    found = []
    for step in range(2500):
        online.update(*batch(step, generator))
        if step % 10 == 9:
            found.append((online.of_loss(), online.of_term(), online.of_estimator()))
            online = online.next_window()
    values = np.array(found)[1:]
    error = values.std(0, ddof=1) / len(values) ** 0.5
    for name, mean, truth, one in zip(("loss", "term", "estimator"), values.mean(0), CASES[batch], error):
        assert abs(mean - truth) < 4.0 * one, (name, mean, truth, one)
        assert one < 0.05 * truth  # so that the strata's share, and a bias of 1/n in each of two terms, would show


def test_eq_23_is_the_papers_and_strata_bias_it() -> None:
    """+1/(n − 1) of the rate's variance from one batch with a stratum for each sample; none from three."""
    generator = np.random.default_rng(0)
    of_one = []
    of_three = []
    online = OnlineVariance()
    for step in range(3600):
        batch = stratified(step, generator)
        one = OnlineVariance()
        one.update(*batch)
        of_one.append(one.of_loss_eq_23())
        online.update(*batch)
        if step % 3 == 2:
            of_three.append(online.of_loss())
            online = OnlineVariance()
    for found, truth in ((of_one, TRUTH + RATE / (SIZE - 1)), (of_three, TRUTH)):
        error = np.std(found) / len(found) ** 0.5
        assert abs(np.mean(found) - truth) < 4.0 * error
        assert error < RATE / (SIZE - 1) / 8.0


def test_per_token_losses_are_judged_by_what_is_averaged() -> None:
    """l = 2 + noise, P in 1 … 40: the batch's loss is Σ P l / Σ P. A term is P l / mean P, which P alone moves by 2."""

    def batch(_: int, generator: np.random.Generator) -> Batch:
        count = generator.integers(1, 41, SIZE).astype(float)
        loss = 2.0 + generator.normal(size=SIZE)
        return np.ones(SIZE), loss, loss * count / count.mean()

    online = simulated(batch, 3000)
    generator = np.random.default_rng(1)
    counts = generator.integers(1, 41, (20000, SIZE)).astype(float)
    truth = SIZE * float((np.square(counts).sum(1) / counts.sum(1) ** 2).mean())  # given the counts, Var(l) = 1
    assert online.of_loss() == pytest.approx(1.0, rel=0.03)
    assert online.of_estimator() == pytest.approx(truth, rel=4 * 2 / 3000**0.5)
    assert online.of_term() == pytest.approx(
        truth + 4.0 * (truth - 1.0), rel=0.05
    )  # E[(P/mean P)²] = truth, mean l = 2


def test_over_one_batch_it_is_the_sample_variance() -> None:
    generator = np.random.default_rng(0)
    weight = generator.random(500) + 0.5
    loss = generator.random(500)
    online = OnlineVariance()
    online.update(weight, loss, weight * loss)
    assert online.of_term() == pytest.approx((weight * loss).var(ddof=1))
    ones = OnlineVariance()
    ones.update(np.ones(500), loss, loss)
    assert ones.of_loss() == pytest.approx(loss.var(ddof=1))  # Eq. 23, while there is no other batch
    assert np.isnan(ones.of_estimator())


def test_a_window_goes_on_from_the_one_before() -> None:
    online = simulated(independent, 5).next_window()
    assert np.isnan(online.of_estimator())
    online.update(*independent(5, np.random.default_rng(7)))
    assert online.of_estimator() >= 0.0
    assert online.terms.count == 1


def test_sums_of_an_older_checkpoint_start_anew() -> None:
    old = {"count": 64, "sum_wl": 130.0, "sum_wl2": 300.0, "sum_w2l2": 310.0}
    assert OnlineVariance.of_state(old) == OnlineVariance()


def test_state_survives_json() -> None:
    online = simulated(importance, 5)
    again = OnlineVariance.of_state(json.loads(json.dumps(online.state())))
    assert again == online
    for estimate in ("of_loss", "of_loss_eq_23", "of_term", "of_estimator"):
        assert np.isnan(getattr(OnlineVariance(), estimate)()), estimate
        assert getattr(again, estimate)() == getattr(online, estimate)()
