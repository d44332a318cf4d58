"""The derivative by every log-probability against autograd of the objective written out, for every combination."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mdm.config.schema import RlConfig
from megatron_mdm.config.sections.rl import NORMALIZATIONS_OF
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.rl.advantages import advantages
from megatron_mdm.rl.estimators import Coefficients, Totals, coefficients, values
from megatron_mdm.rl.noise import Rows
from megatron_mdm.rl.objective import Measures, gradient, metrics
from tests.rl.toy import VOCAB, noise_of, settings, toy

P = 5
TOTALS = Totals(num_completions=8, num_tokens=43)
BETA = 0.3


def combinations() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for estimator, normalizations in NORMALIZATIONS_OF.items():
        levels = {"masked": ["token", "sequence"], "elbo": ["sequence"]}.get(estimator, ["token"])
        for level, normalize in itertools.product(levels, normalizations):
            if (level, normalize) == ("sequence", "tokens"):
                continue
            for kl in ("k2", "k3", "k2_split"):
                if level == "token" and kl == "k2_split":
                    continue
                common = {"estimator": estimator, "importance_sampling_level": level, "normalize": normalize, "kl": kl}
                if estimator == "coupled":
                    for full_pass, pair_weight in itertools.product((False, True), ("none", "rate")):
                        found.append({**common, "full_pass": full_pass, "pair_weight": pair_weight})
                elif estimator == "one_step":
                    found.append({**common, "mask_prompt": 0.4})
                else:
                    found += [{**common, "partner": partner} for partner in ("mirror", "complement")]
    return found


def written_out(rl: RlConfig, rows: Rows, now: Tensor, old: Tensor, reference: Tensor, advantage: float) -> Tensor:
    """J of one completion by the formulas of the papers (rl/README.md), token by token. now, old, reference [K, P]."""
    n, tokens = TOTALS
    low, high = 1 - rl.epsilon, 1 + (rl.epsilon_high or rl.epsilon)
    masked = torch.from_numpy(rows.scored)
    q, w = torch.from_numpy(rows.q), torch.from_numpy(rows.weight)

    def surrogate(log_ratio: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        most = ratio.clamp(max=rl.delta) if rl.delta else ratio
        return torch.minimum(most * advantage, ratio.clamp(low, high) * advantage)

    def divergence(difference: Tensor, length: float) -> Tensor:
        scaled = difference / length
        return difference**2 / 2 / length if rl.kl == "k2" else (-scaled).exp() + scaled - 1

    if rl.importance_sampling_level == "sequence":
        estimates = []
        for each in (now, old, reference):
            of_rows = []
            for k in range(len(q)):
                total, count = each[k][masked[k]].sum(), int(masked[k].sum())
                size = {"masked": count, "length": P, "elbo": P * float(q[k])}[rl.normalization]
                size = float(q[k]) if rl.estimator == "elbo" else size
                of_rows.append(total * w[k] / size if count else total)
            estimates.append(torch.stack(of_rows).reshape(rows.parts, -1).mean(1))  # unbiased, of each part
        mine, before, theirs = (each.mean() for each in estimates)
        length = float(P) if rl.estimator == "elbo" else 1.0
        if rl.kl == "k2_split":
            differences = estimates[0] - estimates[2]
            pairs = list(itertools.permutations(range(rows.parts), 2))
            kl = sum((differences[a] * differences[b] for a, b in pairs), torch.zeros(())) / len(pairs) / 2 / length
        else:
            kl = divergence(mine - theirs, length)
        return (surrogate((mine - before) / length) - BETA * kl) / n

    total = torch.zeros((), dtype=torch.float64)
    covered = int(masked.any(0).sum())
    for i in range(P):
        here = [k for k in range(len(q)) if masked[k, i]]
        if not here:
            continue
        share = float(sum(w[k] / q[k] for k in here)) / (n * len(q) * P)
        constant = {"elbo": share, "masked": float(w[0]) / (n * covered), "length": float(w[0]) / (n * P)}.get(
            rl.normalization, float(w[0]) / tokens
        )
        weights = {k: 1 / len(here) for k in here}
        if rl.normalization == "elbo":
            weights = {k: float(w[k] / q[k]) / float(sum(w[j] / q[j] for j in here)) for k in here}
        if rl.estimator == "coupled":
            of_pairs = len(q) - rl.full_pass
            weights = {k: (1 / float(q[k]) if rl.pair_weight == "rate" else 1.0) / (of_pairs // 2) for k in here}
            if rl.full_pass:
                weights = {k: 0.5 * (1.0 if k == of_pairs else weights[k]) for k in here}
        mine, before, theirs = (
            sum((weights[k] * each[k, i] for k in here), torch.zeros(())) for each in (now, old, reference)
        )
        total = total + constant * (surrogate(mine - before) - BETA * divergence(mine - theirs, 1.0))
    return total


def drawn(rl: RlConfig, masking: str, seed: int) -> tuple[Rows, Floats, Floats, Floats]:
    """Rows of two pairs, and three policies' log-probabilities in them."""
    diffusion = settings({"masking": masking, "views": 2, "multisample": 2})[1]
    noise = noise_of(rl, diffusion, seed=seed)
    t, weight = (of_all[0, 0] for of_all in noise.times(0))
    rows = noise.rows(0, 0, 0, toy(P).shape, t, weight * 1.7)  # as of a density that is not 1
    generator = np.random.default_rng(seed)
    now, old, reference = -generator.exponential(1.0, (3, *rows.scored.shape)) * rows.scored
    return rows, now, old, reference


@pytest.mark.parametrize("rl", combinations(), ids=lambda given: " ".join(str(value) for value in given.values()))
def test_weights_are_the_gradient_of_the_objective(rl: dict[str, Any]) -> None:
    clipped = set()
    for seed, advantage, masking in itertools.product(range(3), (0.8, -1.3, 0.0), ("bernoulli", "exact_count")):
        config = settings(**rl, epsilon=0.2, epsilon_high=0.3, delta=(0.0, 1.5, 4.0)[seed], beta=BETA)[0]
        rows, now, old, reference = drawn(config, masking, seed)
        constants = coefficients(config, rows, TOTALS)
        got = gradient(config, constants, now, values(constants, old), values(constants, reference), advantage)
        given = [torch.from_numpy(each) for each in (now, old, reference)]
        given[0].requires_grad_()
        objective = written_out(config, rows, *given, advantage)
        (expected,) = torch.autograd.grad(objective, given[0])
        np.testing.assert_allclose(got.weight, expected.numpy() * rows.scored, rtol=1e-12, atol=1e-15)
        assert (got.weight[~rows.scored] == 0).all()
        assert got.measures.objective == pytest.approx(objective.item(), rel=1e-12, abs=1e-15)
        clipped |= {got.measures.clipped_low > 0, got.measures.clipped_high > 0}
    assert clipped == {False, True}  # both sides of the clip's edges were met


def sequence(epsilon: float = 0.2, beta: float = 0.0, **rl: Any) -> tuple[RlConfig, Coefficients]:
    config, diffusion = settings(
        {"masking": "exact_count"},
        estimator="elbo",
        importance_sampling_level="sequence",
        epsilon=epsilon,
        beta=beta,
        **rl,
    )
    this = toy(P)
    rows = noise_of(config, diffusion).rows(0, 0, 0, this.shape, np.full(1, 0.5), np.ones(1))
    return config, coefficients(config, rows, TOTALS)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_both_sides_of_the_clips_edges_by_finite_differences(advantage: float, epsilon: float) -> None:
    rl, constants = sequence(epsilon)
    place = tuple(np.argwhere(constants.c)[0])

    def at(log_ratio: float) -> tuple[float, float]:
        now = np.zeros_like(constants.c)
        now[place] = log_ratio * constants.d / constants.c[place]
        got = gradient(rl, constants, now, np.zeros(1), None, advantage)
        return got.measures.objective, got.weight[place]

    step = 1e-6
    slope_of_ratio = constants.d / constants.c[place]
    for edge, side in itertools.product(np.log(rl.clip_range), (-1e-4, 1e-4)):
        middle = float(edge) + side
        difference = (at(middle + step)[0] - at(middle - step)[0]) / (2 * step) / slope_of_ratio
        assert at(middle)[1] == pytest.approx(difference, rel=1e-6, abs=1e-9)
        outwards = (edge >= 0) if advantage > 0 else (edge <= 0)
        assert (at(middle)[1] == 0) == bool(outwards and side * advantage > 0)


def test_a_ratio_of_1_is_never_clipped() -> None:
    """With epsilon 0 (ESPO's countdown) the first update is that of the plain policy gradient."""
    rl, constants = sequence(epsilon=0.0)
    same = np.full(constants.c.shape, -0.7) * (constants.c > 0)
    for advantage in (1.0, -1.0):
        got = gradient(rl, constants, same, values(constants, same), None, advantage)
        np.testing.assert_array_equal(got.weight, constants.c * constants.n * advantage / constants.d)
        assert (got.measures.ratio, got.measures.clipped_low, got.measures.clipped_high) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("rl", combinations()[::3], ids=lambda given: " ".join(str(value) for value in given.values()))
def test_no_advantage_and_no_divergence_is_exactly_no_gradient(rl: dict[str, Any]) -> None:
    config = settings(**rl)[0]
    rows, now, old, _ = drawn(config, "bernoulli", 1)
    constants = coefficients(config, rows, TOTALS)
    assert not gradient(config, constants, now, values(constants, old), None, 0.0).weight.any()


@pytest.mark.parametrize("rl", combinations()[::3], ids=lambda given: " ".join(str(value) for value in given.values()))
@pytest.mark.filterwarnings("error")
def test_rows_without_a_mask_are_nothing(rl: dict[str, Any]) -> None:
    config = settings(**rl, beta=BETA)[0]
    number = 4 + config.full_pass
    nothing = np.zeros((number, P), dtype=bool)
    rows = Rows(nothing, nothing, np.zeros(number), np.zeros(number), np.ones(number), 2)
    constants = coefficients(config, rows, TOTALS)
    zeros = np.zeros((number, P))
    got = gradient(config, constants, zeros, values(constants, zeros), values(constants, zeros), 1.0)
    assert not got.weight.any()
    assert np.isfinite(list(metrics(np.array([got.measures, got.measures])).values())).all()


def test_identical_completions_cancel_exactly_where_a_group_shares_its_masks() -> None:
    for share_noise in ("group_masks", "group_time"):
        rl, diffusion = settings({"masking": "exact_count", "views": 2}, share_noise=share_noise)
        noise = noise_of(rl, diffusion)
        this = toy(P)
        t, weight = noise.times(4)
        total: Any = 0.0
        for completion, advantage in enumerate(advantages(rl, np.array([[1.0, 0.0]]), np.zeros((1, 2), dtype=bool))[0]):
            rows = noise.rows(4, 2, completion, this.shape, t[2, completion], weight[2, completion])
            constants = coefficients(rl, rows, TOTALS)
            table = this.of(rows.masked)
            log_probs = table[:, :, 0] * rows.scored
            got = gradient(rl, constants, log_probs, values(constants, log_probs), None, advantage)
            total = total + np.einsum("kp,kpn->n", got.weight, table[:, :, 1:])
        assert total.any() == (share_noise != "group_masks")


ONE_TOKEN = {
    "one_step": {},
    "masked": {"normalize": "masked"},
    "elbo": {"importance_sampling_level": "sequence"},
    "coupled": {"full_pass": True},
}


@pytest.mark.parametrize("estimator", ONE_TOKEN)
@pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
def test_expected_update_of_a_bandit_is_the_policy_gradient(estimator: str, masking: str) -> None:
    """One token, whose probabilities are known exactly: the mean over all groups, by their probability, is the gradient
    of the expected reward; and with the mean as baseline (G − 1)/G of it."""
    reward = np.array([0.3, 1.0, -0.5, 0.0])
    logits = np.array([0.2, -1.0, 0.5, 0.1])
    policy = np.exp(logits) / np.exp(logits).sum()
    exact = policy * (reward - policy @ reward)
    views = 2 if estimator == "coupled" else 1
    for baseline, share in (("leave_one_out", 1.0), ("mean", 2 / 3)):
        rl, diffusion = settings(
            {"masking": masking, "views": views, "epsilon": 1e-12},
            estimator=estimator,
            scale_rewards="none",
            baseline=baseline,
            **ONE_TOKEN[estimator],
        )
        always = noise_of(rl, diffusion).rows_of([np.full(1, 0.5)], toy(1).shape, np.ones(1), np.ones(1))
        constants = coefficients(rl, always, Totals(3, 3))
        total = np.zeros(VOCAB)
        for group in itertools.product(range(VOCAB), repeat=3):
            chosen = np.array(group)
            scores = advantages(rl, reward[chosen][None], np.zeros((1, 3), dtype=bool))[0]
            for action, advantage in zip(group, scores):
                log_probs = np.full(always.scored.shape, np.log(policy[action])) * always.scored
                got = gradient(rl, constants, log_probs, values(constants, log_probs), None, advantage)
                score = (np.arange(VOCAB) == action) - policy
                total += policy[chosen].prod() * got.weight.sum() * score
        np.testing.assert_allclose(total, exact * share, rtol=1e-10)


def test_metrics_have_trls_names() -> None:
    rl, constants = sequence(beta=0.1, kl="k3")
    scored = constants.c > 0
    now = -1.0 * scored
    measures = [
        gradient(rl, constants, now * scale, values(constants, now), values(constants, now), advantage).measures
        for scale, advantage in ((0.5, 1.0), (2.0, -1.0), (1.0, 0.5))
    ]
    result = metrics(np.array(measures))
    value = values(constants, now)[0] / constants.d
    ratios = np.exp(value * np.array([-0.5, 1.0, 0.0]))
    assert result["ratio/mean"] == pytest.approx(ratios.mean())
    assert result["ratio/std"] == pytest.approx(ratios.std())
    assert (result["ratio/min"], result["ratio/max"]) == pytest.approx((ratios.min(), ratios.max()))
    assert result["clip_ratio/low_mean"] == result["clip_ratio/high_mean"] == pytest.approx(1 / 3)
    assert result["clip_ratio/region_mean"] == pytest.approx(2 / 3)
    assert (result["clip_ratio/low_min"], result["clip_ratio/high_max"]) == (0.0, 1.0)
    difference = np.log(ratios)
    assert result["kl"] == pytest.approx((np.exp(-difference) + difference - 1).mean())
    assert result["kl_k1"] == pytest.approx(difference.mean())
    assert result["entropy"] == pytest.approx(3.5 / 3)
    assert "noise_share" not in result  # of one row nothing is known
    assert metrics(np.empty((0, len(Measures._fields)))) == {}
