"""Noise and bias of an update's gradient: estimates against gradients whose moments are known, and on a small model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import UniformSampler
from megatron_mdm.rl.designs import DENSITY_FROM, DESIGNS, config_of, target
from megatron_mdm.rl.rollouts import Rollout, nothing
from megatron_mdm.rl.variance import Kind, Sums, fitted_density, measured, of_resampled, resamples
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, small_config, small_model

GROUPS = 6
SIZE = 40


def sums_of(gradients: Floats, wanted: Floats | None = None, rows: int = 1) -> Sums:
    """gradients [R, B, S], as if they were their own sketches."""
    draws = len(gradients)
    mean = gradients.mean(0)
    centred = gradients - mean
    whole = gradients.sum(1)
    return Sums(
        rows=rows,
        draws=draws,
        mean=mean.astype(np.float32),
        products=centred @ centred.transpose(0, 2, 1),
        mean_square=float(np.square(whole.mean(0)).sum()),
        variance=float(whole.var(0, ddof=1).sum()),
        inner=float("nan") if wanted is None else float(whole.mean(0) @ wanted),
        t=np.random.default_rng(1).random((draws, len(mean))),
        squares=np.square(gradients).sum(2),
    )


def drawn(generator: np.random.Generator, means: Floats, spread: float, common: float, draws: int) -> Floats:
    """[R, B, S]: independent noise of each group, less or more of one that groups have in common."""
    own = generator.standard_normal((draws, *means.shape)) * spread
    shared = generator.standard_normal((draws, 1, means.shape[1])) * common
    return means + own + shared


def test_estimates_are_those_of_known_gradients() -> None:
    generator = np.random.default_rng(0)
    common = generator.standard_normal(SIZE)
    means = common + generator.standard_normal((GROUPS, SIZE))
    bias = 0.8 * generator.standard_normal((GROUPS, SIZE))
    total, biased = means.sum(0), (means + bias).sum(0)
    exact = drawn(generator, means, 0.3, 0.0, 4000)
    wanted = sums_of(exact)
    exact_mean = exact.sum(1).mean(0)
    first = sums_of(drawn(generator, means, 1.0, 0.0, 4000), exact_mean)
    other = sums_of(drawn(generator, means + bias, 0.5, 0.2, 4000), exact_mean)
    known = Kind(exact=True, independent=True)
    of_first = measured(first, known, first, known, wanted)
    of_other = measured(other, Kind(exact=False, independent=False), first, known, wanted)
    power, other_power = np.square(total).sum(), np.square(biased).sum()
    noise = SIZE * GROUPS / power
    assert of_first.noise[0] == pytest.approx(noise, rel=0.05)
    assert of_first.scale[0] == pytest.approx(1.0, abs=0.01)
    assert of_first.cosine.tolist() == of_first.relative_noise.tolist() == [1.0, 1.0, 1.0]
    assert of_first.alignment[0] == pytest.approx(1 / np.sqrt(1 + noise), abs=0.01)
    scale, variance = biased @ total / power, SIZE * (GROUPS * 0.25 + GROUPS**2 * 0.04)
    assert of_other.scale[0] == pytest.approx(scale, rel=0.02)
    assert of_other.noise[0] == pytest.approx(variance / scale**2 / power, rel=0.05)
    assert of_other.relative_noise[0] == pytest.approx(variance / scale**2 / (SIZE * GROUPS), rel=0.05)
    assert of_other.cosine[0] == pytest.approx(biased @ total / np.sqrt(power * other_power), abs=0.01)
    assert of_other.alignment[0] == pytest.approx(biased @ total / np.sqrt(power * (other_power + variance)), abs=0.01)
    for estimate, low, high in of_other:
        assert low < estimate < high
    estimated = measured(other, Kind(exact=False, independent=False), first, known._replace(exact=False), wanted)
    assert estimated.relative_noise[0] == pytest.approx(of_other.relative_noise[0] * of_first.scale[0] ** 2)
    alone = measured(other, Kind(exact=False, independent=True), first, known, wanted)  # without what groups share
    assert alone.noise[0] == pytest.approx(of_other.noise[0] * GROUPS * 0.29 / (variance / SIZE), rel=0.05)


def test_few_draws_do_not_bias_the_measures() -> None:
    """Their noise is taken off squared means."""
    generator = np.random.default_rng(0)
    means = generator.standard_normal((GROUPS, SIZE))
    powers = [sums_of(drawn(generator, means, 2.0, 0.0, 4)).power for _ in range(2000)]
    error = np.std(powers, ddof=1) / np.sqrt(len(powers))
    assert abs(np.mean(powers) - np.square(means.sum(0)).sum()) < 4 * error


def test_copies_of_a_group_have_noise_of_their_own() -> None:
    """A resample of groups that are all alike has the variance of the groups, whatever is drawn twice."""
    covariance = np.full((GROUPS, GROUPS), -0.1) + np.eye(GROUPS)
    whole = covariance.sum()
    np.testing.assert_allclose(of_resampled(covariance, resamples(GROUPS)), whole, rtol=1e-12)


def test_fitted_density_follows_the_squares() -> None:
    """√E[‖g‖² | t], a tenth of it uniform."""
    gradients = np.zeros((2000, GROUPS, 1))
    sums = sums_of(gradients)
    squares = np.where(sums.t < 0.5, 9.0, 1.0)
    density = fitted_density(Sums(**{**sums.arrays(), "squares": squares}))
    np.testing.assert_allclose(density[:4], 0.9 * 1.5 + 0.1)
    np.testing.assert_allclose(density[4:], 0.9 * 0.5 + 0.1)


def test_kept_sums_are_read_as_they_were() -> None:
    sums = sums_of(np.random.default_rng(0).standard_normal((3, GROUPS, SIZE)), np.ones(SIZE))
    again = Sums.of({name: np.asarray(value) for name, value in sums.arrays().items()})
    for name, value in sums.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), value)


def small_rollout() -> Rollout:
    """Two prompts with two completions each: the first's are the same."""
    tokens = np.random.default_rng(0).integers(2, 50, (4, 6))
    tokens[1] = tokens[0]
    tokens[:, -1] = EOS
    return Rollout(
        number=np.array(0),
        rows=np.arange(2),
        prompt_lengths=np.array([3, 4]),
        prompts=np.arange(2, 9),
        tokens=tokens,
        denoising_steps=np.full(4, 6),
        lengths=np.full(4, 6),
        truncated=np.zeros(4, dtype=bool),
        scores=np.zeros((4, 1)),
        rewards=np.array([1.0, 0.0, 1.0, 0.0]),
        advantages=np.array([1.0, -1.0, 0.5, -0.5]),
        t=nothing(),
        weight=nothing(),
    )


def _draw(folder: Any) -> dict[str, Any]:
    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.generation.settings import SpecialIds
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.rl.gradient_draws import Weights, draw

    context = initialize()
    engine = InferenceEngine(build_model(small_model(init_std=0.2), ParallelConfig(), context, 5), "fp32")
    same = InferenceEngine(build_model(small_model(init_std=0.2), ParallelConfig(), context, 5), "fp32")
    config = small_config(folder, rl={"num_generations": 2, "rewards": [{"name": "exact_match"}]})
    special = SpecialIds(MASK, PAD, EOS)
    found = {}
    for name, number, old in (
        ("target", 1, None),
        (DENSITY_FROM, 8, None),
        ("again", 8, same),
        ("espo", 4, None),
        ("diffu_grpo", 3, None),
        ("rate and masks shared, strata", 3, None),
    ):
        design = {"target": target(40), "again": DESIGNS[DENSITY_FROM]}.get(name) or DESIGNS[name]
        of_run = config_of(config, design, 2)
        weights = Weights(engine, old, special, context)
        wanted = found["target"][1] if found else None
        found[name] = draw(
            weights, of_run, small_rollout(), UniformSampler(), number if name != "target" else 2, 7, wanted, name
        )
    return {name: (sums.arrays(), mean) for name, (sums, mean) in found.items()}


def test_gradients_of_a_small_model(tmp_path: Any) -> None:
    """What is exact agrees with what is sketched; where θ_old is θ, ratios from two models change nothing; completions
    that are the same cancel where their group shares its masks."""
    (results,) = run_ranks(_draw, 1, tmp_path)
    found = {name: Sums(**arrays) for name, (arrays, _) in results.items()}
    for name in (DENSITY_FROM, "espo"):
        sums = found[name]
        assert sums.variance == pytest.approx(sums.covariance.sum(), rel=0.15)  # 2,048 buckets, few draws
        assert sums.mean_square == pytest.approx(np.square(sums.mean.sum(0, dtype=np.float64)).sum(), rel=0.15)
    again = results["again"][1]
    np.testing.assert_allclose(again, results[DENSITY_FROM][1], atol=1e-5 * np.abs(again).max())
    assert found["diffu_grpo"].squares[:, 1].min() > 0
    assert (
        found["rate and masks shared, strata"].squares[:, 0] < 1e-12 * found[DENSITY_FROM].squares[:, 0].mean()
    ).all()
    assert (found["espo"].rows, found["target"].rows, found["diffu_grpo"].rows) == (4, 40, 1)
