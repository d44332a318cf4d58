"""Noise of the updates of a rollout: mask rates, and noised rows of a completion.

Pure functions of (seed, rollout, iteration, group or completion), so every layout and every resumed run has the same,
and θ, θ_old and the reference see the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_mdm.config.schema import DiffusionConfig, RlConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import Bools, MaskDesign
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import TSampler
from megatron_mdm.rl.masks import pair_rule
from megatron_mdm.rl.times import QUANTILES, gauss_legendre


class Shape(NamedTuple):
    """Of a completion in its row."""

    prompt: int  # tokens before it
    scored: int  # P: its tokens whose likelihood counts, from its beginning
    length: int  # its tokens in the row: the scored ones, then the tail


class Rows(NamedTuple):
    """K noised rows of a completion: independent masks, or pairs of a mask and its partner, then the full pass."""

    masked: Bools  # [K, prompt + length]: what the mask token replaces
    scored: Bools  # [K, P]: masked[:, prompt : prompt + P]
    t: Floats  # [K]: mask rate
    q: Floats  # [K]: marginal probability of a scored position (M/(P + 1) for complementary counts: rl/masks.py)
    weight: Floats  # [K]: importance weight 1/p(t) of the rate that was drawn; 1 where importance_weight is off
    parts: int  # how many independent rows or pairs there are, without the full pass; 1 at a quadrature's nodes


class RlNoise:
    """What `rl` and `diffusion` ask for, at a density of t."""

    def __init__(self, rl: RlConfig, diffusion: DiffusionConfig, sampler: TSampler, seed: int, per_step: int) -> None:
        """per_step: completions of an optimizer step, whole groups."""
        self.rl = rl
        self.design = MaskDesign.of(diffusion)
        self.sampler = sampler
        self.seed = seed
        self.per_step = per_step
        self.num_rows = diffusion.rows_per_sample + rl.full_pass
        self._pair = pair_rule(rl.pairing, diffusion.masking)
        self._counts = diffusion.masking != "bernoulli"

    def use(self, sampler: TSampler) -> None:
        """Draw t from another density from the next rollout on."""
        self.sampler = sampler

    def times(self, rollout: int) -> tuple[Floats, Floats]:
        """t and importance weight 1/p(t), [μ, B·G, repeats] each, of a rollout's updates and completions, and of the
        independent rows or pairs of each (diffusion.multisample); equal within a group unless share_noise is none.

        t = lo + (hi − lo) F⁻¹(u) in the rate_range; the weight is the density's on that range, so its mean is 1. At
        token level a completion has one rate, since a token's value is its mean over masks of that rate; at sequence
        level each repeat has one of its own, so that repeats are independent.
        """
        rl = self.rl
        size = 1 if rl.share_noise == "none" else rl.num_generations
        minibatches = [self._quantiles(rollout, index, size) for index in range(rl.num_completions // self.per_step)]
        quantile, weight = self.sampler.quantile(np.concatenate(minibatches, axis=1).repeat(size, axis=1))
        if rl.times == "quadrature":
            weight = weight * gauss_legendre(self.design.repeats).weights
        low, high = rl.rate_range
        return low + (high - low) * quantile, weight if rl.importance_weight else np.ones_like(weight)

    def _quantiles(self, rollout: int, minibatch: int, size: int) -> Floats:
        """u [μ, units, repeats] of an optimizer step's completions, by units of so many."""
        rl, repeats = self.rl, self.design.repeats
        units = self.per_step // size
        if rl.times == "quadrature":
            return np.broadcast_to(gauss_legendre(repeats).nodes, (rl.num_iterations, units, repeats))
        generator = stream(self.seed, Purpose.RL_TIMES, rollout, minibatch)
        number = repeats if rl.importance_sampling_level == "sequence" else 1
        draws = [QUANTILES[rl.times](generator, units, rl.num_iterations) for _ in range(number)]
        return np.stack(draws * (repeats // number), axis=2)

    def rows(self, rollout: int, iteration: int, completion: int, shape: Shape, t: Floats, weight: Floats) -> Rows:
        """The rows of a completion of the rollout (0 … B·G − 1) at an update; t, weight [repeats]: its times()."""
        update = rollout * self.rl.num_iterations + iteration
        unit = completion // self.rl.num_generations if self.rl.share_noise == "group_masks" else completion
        purpose, size = (
            (Purpose.RL_PROMPT_MASKS, shape.prompt)
            if self.rl.estimator == "one_step"
            else (Purpose.RL_MASKS, shape.length)
        )
        repeats = range(self.design.repeats)
        streams = [stream(self.seed, purpose, update, unit * len(repeats) + index) for index in repeats]
        return self.rows_of([generator.random(size) for generator in streams], shape, t, weight)

    def rows_of(self, uniforms: Sequence[Floats], shape: Shape, t: Floats, weight: Floats) -> Rows:
        """The rows that uniform numbers give: for each repeat one by position of the completion (by position, so that
        completions of any length that share them have the same), or of the prompt for estimator one_step."""
        draw = self._one_step if self.rl.estimator == "one_step" else self._at_rates
        rows = draw(uniforms, shape, t, weight)
        hidden = {"noise": shape.length, "keep": shape.scored, "drop": shape.scored}[self.rl.tail]
        rows.masked[:, shape.prompt + hidden :] = False
        return _with_full_pass(rows, shape.prompt, hidden) if self.rl.full_pass else rows

    def _at_rates(self, uniforms: Sequence[Floats], shape: Shape, t: Floats, weight: Floats) -> Rows:
        """Part of the completion is masked, in each of the views."""
        views = 2 if self.design.complementary else 1
        pairs = [self._pair(self.design, numbers, shape.scored, float(rate)) for numbers, rate in zip(uniforms, t)]
        completion = np.concatenate([pair.masked[:views] for pair in pairs])
        prompt = np.zeros((len(completion), shape.prompt), dtype=np.bool_)
        return Rows(
            np.concatenate([prompt, completion], axis=1),
            completion[:, : shape.scored],
            np.concatenate([pair.t[:views] for pair in pairs]),
            np.concatenate([pair.q[:views] for pair in pairs]),
            weight.repeat(views),
            1 if self.rl.times == "quadrature" else len(pairs),
        )

    def _one_step(self, uniforms: Sequence[Floats], shape: Shape, t: Floats, weight: Floats) -> Rows:
        """The whole completion is masked, and the prompt in part: each token with probability p = mask_prompt, or p of
        all, rounded; mirrored in the second view. There is no rate, and so no importance weight."""
        share = self.rl.mask_prompt
        if self._counts:
            share = float(np.rint(share * shape.prompt)) / max(shape.prompt, 1)
        views = 2 if self.design.complementary else 1
        prompt = np.concatenate([self.design.rule.draw(numbers, share)[:views] for numbers in uniforms])
        completion = np.ones((len(prompt), shape.length), dtype=np.bool_)
        ones = np.ones(len(prompt))
        return Rows(
            np.concatenate([prompt, completion], axis=1),
            completion[:, : shape.scored],
            ones,
            ones,
            ones,
            len(uniforms),
        )


def _with_full_pass(rows: Rows, prompt: int, hidden: int) -> Rows:
    """One more row, in which the completion is masked: its first `hidden` tokens."""
    last = np.zeros((1, rows.masked.shape[1]), dtype=np.bool_)
    last[:, prompt : prompt + hidden] = True
    one = np.ones(1)
    return Rows(
        np.concatenate([rows.masked, last]),
        np.concatenate([rows.scored, np.ones((1, rows.scored.shape[1]), dtype=np.bool_)]),
        np.concatenate([rows.t, one]),
        np.concatenate([rows.q, one]),
        np.concatenate([rows.weight, rows.weight[:1]]),
        rows.parts,
    )
