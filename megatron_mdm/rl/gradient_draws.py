"""Gradients of an update drawn many times, with other rates and masks each time."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import TSampler
from megatron_mdm.engine.inference import InferenceEngine
from megatron_mdm.engine.inputs import InputLayout
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar
from megatron_mdm.reports.variance import SKETCH_SIZE, Sketch
from megatron_mdm.rl.batches import Batches, MicroBatch
from megatron_mdm.rl.estimators import Totals, coefficients, values
from megatron_mdm.rl.noise import RlNoise
from megatron_mdm.rl.objective import gradient
from megatron_mdm.rl.rollouts import Rollout, nothing
from megatron_mdm.rl.variance import Sums


class Weights(NamedTuple):
    """Whose gradients are drawn."""

    engine: InferenceEngine  # θ
    old: InferenceEngine | None  # θ_old; None: θ itself, so that all ratios are 1
    special: SpecialIds
    context: ParallelContext


def with_signal(rollout: Rollout, num_groups: int, where: str) -> Rollout:
    """The first groups whose advantages are not all 0. Raises UserError where there are too few."""
    size = rollout.group_size
    found = np.flatnonzero(rollout.advantages.reshape(-1, size).any(1))[:num_groups]
    if len(found) < num_groups:
        raise UserError(f"{where}: {len(found)} groups have rewards that differ; ask for as many with --groups")
    completions = (found[:, None] * size + np.arange(size)).ravel()
    return replace(
        rollout,
        rows=rollout.rows[found],
        prompt_lengths=rollout.prompt_lengths[found],
        prompts=np.concatenate([rollout.prompt_of_group(int(group)) for group in found]),
        **{
            name: getattr(rollout, name)[completions]
            for name in ("tokens", "denoising_steps", "lengths", "truncated", "scores", "rewards", "advantages")
        },
        old=nothing(),
        reference=nothing(),
    )


def draw(
    weights: Weights,
    config: RunConfig,
    rollout: Rollout,
    sampler: TSampler,
    num_draws: int,
    seed: int,
    target: Floats | None,
    name: str,
) -> tuple[Sums, Floats]:
    """Sums over draws of the whole update's gradient, and its mean [n] float64. target [n]: the mean of g*'s draws."""
    noise = RlNoise(config.rl, config.diffusion, sampler, seed, config.batch.global_size)
    batches = Batches(config, noise, weights.special, weights.context)
    totals = Totals(len(rollout.tokens), int(_scored(batches, rollout).sum()))
    sketch = Sketch(weights.engine.model)
    groups = range(rollout.num_groups)
    sketches = np.zeros((num_draws, len(groups), SKETCH_SIZE), dtype=np.float32)
    t, squares = np.zeros((2, num_draws, len(groups)))
    mean = torch.zeros(len(sketch.bucket), dtype=torch.float64)
    total_squares = 0.0
    for index in progress_bar(range(num_draws), desc=name, unit="update", enabled=weights.context.is_main):
        rates, importance = noise.times(index)
        drawn = replace(rollout, number=np.array(index), t=rates, weight=importance)
        whole = torch.zeros_like(mean)
        for group in groups:
            for micro in batches(drawn, 0, _members(rollout, group)).micro_batches:
                _backward(weights, config, micro, rollout, totals)
            flat = sketch.gradient()
            squares[index, group] = float(flat.double().square().sum())
            sketches[index, group] = sketch.of(flat)
            whole += flat
        t[index] = rates[0, :: rollout.group_size, 0]
        total_squares += float(whole.square().sum())
        mean += whole / num_draws
    of_groups = sketches.mean(0)
    centred = (sketches - of_groups).astype(np.float64)
    mean_square = float(mean.square().sum())
    sums = Sums(
        rows=noise.num_rows,
        draws=num_draws,
        mean=of_groups,
        products=centred @ centred.transpose(0, 2, 1),
        mean_square=mean_square,
        variance=(total_squares - num_draws * mean_square) / (num_draws - 1),
        inner=float("nan") if target is None else float(mean.numpy() @ target),
        t=t,
        squares=squares,
    )
    return sums, mean.numpy()


def _members(rollout: Rollout, group: int) -> np.ndarray:
    return np.arange(group * rollout.group_size, (group + 1) * rollout.group_size)


def _scored(batches: Batches, rollout: Rollout) -> np.ndarray:
    return np.array([batches.shape(rollout, completion).scored for completion in range(len(rollout.tokens))])


def _backward(weights: Weights, config: RunConfig, micro: MicroBatch, rollout: Rollout, totals: Totals) -> None:
    """The objective's gradient by micro's completions is added to the parameters', with a minus. Where θ is θ_old and
    nothing is held to a reference, its derivative by log-probabilities does not depend on them."""
    of_each = [coefficients(config.rl, noised.rows, totals) for noised in micro.completions]
    if weights.old is None:
        now = before = [np.zeros(constants.c.shape) for constants in of_each]
    else:
        now, before = (micro.log_probs(each.token_losses([micro.inputs])[0]) for each in (weights.engine, weights.old))
    derivatives = [
        gradient(
            config.rl,
            constants,
            now[place],
            values(constants, before[place]),
            None,
            float(rollout.advantages[micro.completions[place].completion]),
        ).weight
        for place, constants in enumerate(of_each)
    ]
    total, _ = weights.engine.model(InputLayout().on_device(micro.weighted(derivatives)))
    total.backward()
