"""Rates and rows of a rollout's updates: their laws, what a group shares, and what sharing does to the variance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_mdm.config.schema import DiffusionConfig, RlConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.rl.noise import RlNoise, Shape
from megatron_mdm.rl.times import QUANTILES
from tests.rl.toy import STEEP, UNIFORM, noise_of, settings, toy

G = 4
PROMPTS = 12
MU = 3
PER_STEP = 24  # 6 groups, 2 minibatches


def noise(masking: str = "exact_count", multisample: int = 1, views: int = 2, seed: int = 5, **rl: object) -> RlNoise:
    config = RlConfig(num_generations=G, prompts_per_rollout=PROMPTS, num_iterations=MU, **rl)
    return RlNoise(
        config, DiffusionConfig(masking=masking, multisample=multisample, views=views), STEEP, seed, PER_STEP
    )


def quantiles(t: Floats) -> Floats:
    return np.interp(t, np.linspace(0, 1, len(STEEP.cumulative)), STEEP.cumulative)


@pytest.mark.parametrize("share_noise", ["none", "group_time", "group_masks"])
def test_stratified_rates_are_strata_of_every_update_and_evenly_spaced_over_updates(share_noise: str) -> None:
    t, weight = noise(share_noise=share_noise).times(3)
    assert t.shape == weight.shape == (MU, PROMPTS * G, 1)
    np.testing.assert_allclose(weight, 1 / STEEP.density(t))
    u = quantiles(t[:, :, 0])
    if share_noise != "none":
        u = u.reshape(MU, PROMPTS, G)
        assert (u == u[:, :, :1]).all()
        u = u[:, :, 0]
    units = u.shape[1] // 2
    for update, minibatch in itertools.product(u, range(2)):
        ordered = np.sort(update[minibatch * units : (minibatch + 1) * units])
        assert (np.diff(np.append(ordered, ordered[0] + 1)) < 2 / units).all()  # no stratum, as they are turned, empty
    start = np.sort(u[0, :units] * units)
    assert (start.astype(int) == np.arange(units)).all()  # those of the first update are not turned
    np.testing.assert_allclose((u - u[0]) % 1, np.arange(MU)[:, None] / MU + 0 * u, atol=1e-9)
    assert (np.diff(t[:, :, 0], axis=0) < 0).any()  # in no order


@pytest.mark.parametrize("rule", ["stratified", "systematic", "iid_sorted"])
def test_rates_of_a_rollout_have_the_samplers_law(rule: str) -> None:
    """Mean and square of u over the μ updates of 3,000 rollouts, which are independent of each other."""
    u = np.stack([QUANTILES[rule](np.random.default_rng(seed), 2, MU)[:, 0] for seed in range(3000)])
    for power in (1, 2, 3):
        values = (u**power).mean(1)
        error = values.std(ddof=1) / np.sqrt(len(values)) + 1e-12
        assert abs(values.mean() - 1 / (power + 1)) < 4 * error
    assert ((u >= 0) & (u < 1)).all()
    if rule == "stratified":  # each update alone, too
        error = u.std(0, ddof=1) / np.sqrt(len(u))
        assert (np.abs(u.mean(0) - 0.5) < 4 * error).all()
    else:
        assert (np.diff(u, axis=1) > 0).all()


def test_unigrpos_printed_rates_lean_to_high_ones() -> None:
    """t_n is uniform on [a_n, 1], a_n = (n − 1)/(μ − 1); the last masks everything (spec: 0.20, 0.47, 0.87, 1.67 on the
    quarters and 0.2 at 1, mean 0.75, for μ = 5)."""
    number = 200_000
    u = QUANTILES["paper"](np.random.default_rng(0), number, 5)
    assert (u[4] == 1.0).all()
    edges = np.arange(5) / 4
    density = np.zeros(4)
    for start in np.arange(4) / 4:
        density += np.diff(np.maximum(edges, start)) / (1 - start) / 5 * 4
    np.testing.assert_allclose(density, [0.20, 0.47, 0.87, 1.67], atol=0.005)
    inside = u[:4][None] + 0.0005  # T = 1000 discrete times
    found = ((inside >= edges[:4, None, None]) & (inside < edges[1:, None, None])).mean((1, 2)) * 4 / 5 * 4
    np.testing.assert_allclose(found, density, atol=0.01)
    assert u.mean() == pytest.approx(0.75, abs=0.002)
    assert (QUANTILES["paper"](np.random.default_rng(0), 3, 1) < 1).all()


def test_one_rate_for_all_prompts_of_an_update() -> None:
    t = noise(times="systematic").times(0)[0][:, :PER_STEP]
    assert (t == t[:, :1]).all()


def test_rates_stay_in_their_range_and_weights_are_of_the_density_there() -> None:
    t, weight = noise(rate_range=(0.2, 0.8)).times(1)
    assert ((t >= 0.2) & (t <= 0.8)).all()
    np.testing.assert_allclose(weight, 1 / STEEP.density((t - 0.2) / 0.6))
    assert (noise(importance_weight=False).times(1)[1] == 1).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_repeats_have_rates_of_their_own_at_sequence_level_alone(level: str) -> None:
    t, _ = noise(multisample=3, importance_sampling_level=level).times(0)
    assert t.shape == (MU, PROMPTS * G, 3)
    assert (t[:, :, 0] == t[:, :, 1]).all() == (level == "token")


def test_noise_is_a_function_of_its_arguments_alone() -> None:
    """In any order, by any object; each argument matters."""
    one, other = noise(), noise()
    shape = Shape(3, 6, 8)
    rows: dict[tuple[int, ...], bytes] = {}
    for rollout, iteration, completion in itertools.product((0, 5), (0, 2), (3, 4, 40)):
        t, weight = one.times(rollout)
        place = (iteration, completion)
        made = one.rows(rollout, *place, shape, np.full(1, 0.6), weight[place])
        other.times(9)
        again = other.rows(rollout, *place, shape, np.full(1, 0.6), weight[place])
        assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
        assert np.array_equal(other.times(rollout)[0], t)
        rows[(rollout, *place)] = made.masked.tobytes()
    assert len(set(rows.values())) > 6
    assert not np.array_equal(one.times(0)[0], noise(seed=6).times(0)[0])
    one.use(UNIFORM)
    assert (one.times(0)[1] == 1).all()


@pytest.mark.parametrize("masking", ["bernoulli", "exact_count", "rounded_count"])
@pytest.mark.parametrize("partner", ["mirror", "complement"])
def test_a_group_shares_masks_by_position_whatever_its_lengths(partner: str, masking: str) -> None:
    rate = np.full(2, 0.4)
    for share_noise in ("group_time", "group_masks"):
        make = noise(masking, multisample=2, partner=partner, share_noise=share_noise)
        first, second = (make.rows(0, 1, completion, Shape(2, 7, 7), rate, rate) for completion in (4, 7))
        other = make.rows(0, 1, 8, Shape(2, 7, 7), rate, rate)  # of the next group
        shorter = make.rows(0, 1, 5, Shape(4, 5, 6), rate, rate)
        same = share_noise == "group_masks"
        assert np.array_equal(first.masked, second.masked) == same
        assert not np.array_equal(first.masked, other.masked)
        if same and (masking, partner) == ("bernoulli", "mirror"):
            assert np.array_equal(shorter.masked[:, 4:], first.masked[:, 2:8])
        assert len(first.masked) == make.num_rows == 4
        assert first.parts == 2


@pytest.mark.parametrize(
    ("partner", "masking"), list(itertools.product(["mirror", "complement"], ["bernoulli", "exact_count"]))
)
def test_pairs_and_what_each_row_is_divided_by(partner: str, masking: str) -> None:
    make = noise(masking, partner=partner)
    size = 7
    for t in (0.0, 0.3, 0.5, 0.8, 1.0):
        rows = make.rows(0, 0, 0, Shape(0, size, size), np.full(1, t), np.full(1, 2.0))
        first, second = rows.scored
        assert (rows.weight == 2.0).all()
        if partner == "complement":
            assert (first ^ second).all()
            assert rows.t.sum() == pytest.approx(1.0)
        else:
            assert (rows.t == t).all()
            assert (first & second).any() == (2 * rows.scored[0].sum() > size) or masking == "bernoulli"
        counts = rows.scored.sum(1)
        if masking == "exact_count":
            assert rows.q.tolist() == (counts / (size + (partner == "complement"))).tolist()
        else:
            end = 1 / (size + 1) if partner == "complement" else 0.0
            q = 1e-3 + (1 - 1e-3) * np.clip(t, end, 1 - end)
            np.testing.assert_allclose(rows.q, [q, 1 - q if partner == "complement" else q])


def test_tails_are_masked_as_often_and_never_scored() -> None:
    shape = Shape(2, 4, 400)
    for tail, share in (("noise", 0.5), ("keep", 0.0)):  # of 4 tokens at t = 0.3, ⌊1.2⌋ + 1 = 2 are masked
        for partner in ("mirror", "complement"):
            make = noise(tail=tail, partner=partner)
            rows = make.rows(0, 0, 1, shape, np.full(1, 0.3), np.ones(1))
            q = (0.5, 0.5) if partner == "mirror" else (0.25, 0.75)  # complement: ⌊1.5⌋ = 1 of 4
            found = rows.masked[:, 6:].mean(1)
            expected = np.array(q) * (share > 0)
            assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 396)).all()
            assert not rows.masked[:, :2].any()
            assert rows.scored.shape == (2, 4)
    full = noise(tail="noise", estimator="coupled", full_pass=True)
    rows = full.rows(0, 0, 1, shape, np.full(1, 0.3), np.ones(1))
    assert full.num_rows == 3
    assert rows.masked[2, 2:].all()
    assert rows.q[2] == rows.t[2] == 1.0
    kept = noise(tail="keep", estimator="one_step", mask_prompt=0.5).rows(0, 0, 1, shape, np.full(1, 0.3), np.ones(1))
    assert kept.scored.all()
    assert not kept.masked[:, 6:].any()


def test_one_step_masks_a_share_of_the_prompt() -> None:
    shape = Shape(20, 3, 3)
    exact = noise(estimator="one_step", mask_prompt=0.15)
    rows = exact.rows(1, 0, 0, shape, np.full(1, 0.3), np.full(1, 5.0))
    assert rows.masked[:, :20].sum(1).tolist() == [3, 3]
    assert not (rows.masked[0, :20] & rows.masked[1, :20]).any()
    assert (rows.weight == 1).all()  # there is no rate
    shares = [
        noise("bernoulli", estimator="one_step", mask_prompt=0.15)
        .rows(1, 0, completion, Shape(400, 1, 1), np.ones(1), np.ones(1))
        .masked[:, :400]
        .mean()
        for completion in range(10)
    ]
    assert abs(np.mean(shares) - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 4000)


def test_shared_rates_leave_least_variance_and_strata_within_a_group_most() -> None:
    """Of Σ A_i s_i over one group, whose advantages add up to 0: by the rates alone, as times() draws them, against the
    covariances enumerated over the P rates that tell counts apart."""
    size, advantage = 4, np.array([1.0, 1.0, -1.5, -0.5])
    completions = [toy(size, completion=index) for index in range(len(advantage))]
    # E[s | t] of each completion: its gradient at each of the counts, [G, P, n]
    by_count = np.stack([each.by_count[1:, 1:] / np.arange(1, size + 1)[:, None] for each in completions])
    centred = by_count - by_count.mean(1, keepdims=True)
    covariance = np.einsum("gpn,hpn->gh", centred, centred) / size  # where rates are shared
    own = np.diag(np.diag(covariance))
    strata = own - (covariance - own) / (len(advantage) - 1)  # of four strata, each of one count
    expected = [advantage @ each @ advantage for each in (covariance, own, strata)]
    assert expected[0] < expected[1] < expected[2]
    laws = (("group_time", "iid_sorted"), ("none", "iid_sorted"), ("none", "stratified"))
    for (share_noise, times), exact in zip(laws, expected):
        rl = RlConfig(
            num_generations=4, prompts_per_rollout=1000, num_iterations=1, share_noise=share_noise, times=times
        )
        make = RlNoise(rl, DiffusionConfig(masking="exact_count"), UNIFORM, 1, 4)  # a group is an update
        counts = np.floor(make.times(0)[0][0, :, 0] * size).astype(int).reshape(-1, 4)
        draws = np.einsum("g,bgn->bn", advantage, centred[np.arange(4), counts])
        squares = (draws**2).sum(1)
        assert abs(squares.mean() - exact) < 4 * squares.std(ddof=1) / np.sqrt(len(squares)), share_noise


def test_shared_masks_leave_nothing_where_completions_are_alike() -> None:
    """The part of the masks cancels, too."""
    size = 4
    alike = [toy(size, completion=completion) for completion in (0, 0)]
    variances = []
    for share_noise in ("group_masks", "group_time"):
        rl, diffusion = settings({"masking": "exact_count"}, share_noise=share_noise)
        make = noise_of(rl, diffusion)
        draws = []
        for rollout in range(60):
            t, weight = make.times(rollout)
            rows = [make.rows(rollout, 0, index, alike[0].shape, t[0, index], weight[0, index]) for index in (0, 1)]
            sums = [
                (each.of(row.masked)[:, :, 1:] * row.scored[:, :, None]).sum((0, 1)) for each, row in zip(alike, rows)
            ]
            draws.append(((sums[0] - sums[1]) ** 2).sum())
        variances.append(np.mean(draws))
    assert variances[0] == 0.0 < variances[1]
