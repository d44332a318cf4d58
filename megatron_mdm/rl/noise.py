"""Noise of the updates of a rollout: mask rates, and noised rows of a completion.

Pure functions of (seed, rollout, iteration, group or completion), so every layout and every resumed run has the same,
and θ, θ_old and the reference see the same rows.
"""

from __future__ import annotations

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
        self._nodes = gauss_legendre(self.design.repeats) if rl.times == "quadrature" else None

    def use(self, sampler: TSampler) -> None:
        """Draw t from another density from the next rollout on."""
        self.sampler = sampler

    def times(self, rollout: int) -> tuple[Floats, Floats]:
        """t and importance weight 1/p(t), [μ, B·G] each, of a rollout's updates and completions; equal within a group
        unless share_noise is none.

        t = lo + (hi − lo) F⁻¹(u) in the rate_range; the weight is the density's on that range, so its mean is 1.
        """
        rl = self.rl
        size = 1 if rl.share_noise == "none" else rl.num_generations
        num_units = self.per_step // size
        u = np.concatenate(
            [
                QUANTILES[rl.times](
                    stream(self.seed, Purpose.RL_TIMES, rollout, minibatch), num_units, rl.num_iterations
                )
                for minibatch in range(rl.num_completions // self.per_step)
            ],
            axis=1,
        ).repeat(size, axis=1)
        quantile, weight = self.sampler.quantile(u)
        low, high = rl.rate_range
        return low + (high - low) * quantile, weight if rl.importance_weight else np.ones_like(weight)

    def rows(self, rollout: int, iteration: int, completion: int, shape: Shape, t: float, weight: float) -> Rows:
        """The rows of a completion of the rollout (0 … B·G − 1) at an update; t, weight: its times()."""
        draw = self._one_step if self.rl.estimator == "one_step" else self._at_rate
        rows = draw(rollout * self.rl.num_iterations + iteration, completion, shape, t, weight)
        return _with_full_pass(rows, shape, self.rl.tail == "noise", weight) if self.rl.full_pass else rows

    def _uniforms(self, purpose: Purpose, update: int, completion: int, size: int) -> Floats:
        """[repeats, size], by position: where a group shares its masks, completions of any length have the same."""
        unit = completion // self.rl.num_generations if self.rl.share_noise == "group_masks" else completion
        repeats = self.design.repeats
        return np.stack(
            [stream(self.seed, purpose, update, unit * repeats + index).random(size) for index in range(repeats)]
        )

    def _at_rate(self, update: int, completion: int, shape: Shape, t: float, weight: float) -> Rows:
        """Part of the completion is masked, in each of the views."""
        views = 2 if self.design.complementary else 1
        uniforms = self._uniforms(Purpose.RL_MASKS, update, completion, shape.length)
        rates, weights = self._rates(t, weight)
        pairs = [self._pair(self.design, numbers, shape.scored, rate) for numbers, rate in zip(uniforms, rates)]
        masked = np.zeros((self.design.views, shape.prompt + shape.length), dtype=np.bool_)
        masked[:, shape.prompt :] = np.concatenate([pair.masked[:views] for pair in pairs])
        if self.rl.tail == "keep":
            masked[:, shape.prompt + shape.scored :] = False
        return Rows(
            masked,
            masked[:, shape.prompt : shape.prompt + shape.scored],
            np.concatenate([pair.t[:views] for pair in pairs]),
            np.concatenate([pair.q[:views] for pair in pairs]),
            weights.repeat(views),
            1 if self._nodes else self.design.repeats,
        )

    def _rates(self, t: float, weight: float) -> tuple[Floats, Floats]:
        """Rate and weight [repeats] of each independent row or pair: those of the completion, or a quadrature's."""
        if self._nodes is None:
            return np.full(self.design.repeats, t), np.full(self.design.repeats, weight)
        u, shares = self._nodes
        low, high = self.rl.rate_range
        return low + (high - low) * u, weight * shares

    def _one_step(self, update: int, completion: int, shape: Shape, t: float, weight: float) -> Rows:
        """The whole completion is masked, and the prompt in part: each token with probability p = mask_prompt, or p of
        all, rounded; mirrored in the second view. There is no rate, and so no importance weight."""
        share = self.rl.mask_prompt
        if self._counts:
            share = float(np.rint(share * shape.prompt)) / max(shape.prompt, 1)
        uniforms = self._uniforms(Purpose.RL_PROMPT_MASKS, update, completion, shape.prompt)
        views = 2 if self.design.complementary else 1
        prompts = np.concatenate([self.design.rule.draw(numbers, share)[:views] for numbers in uniforms])
        shown = self.rl.tail != "noise"
        ends = np.ones((len(prompts), shape.length), dtype=np.bool_)
        ends[:, shape.scored :] = not shown
        ones = np.ones(len(prompts))
        return Rows(
            np.concatenate([prompts, ends], axis=1), ends[:, : shape.scored], ones, ones, ones, self.design.repeats
        )


def _with_full_pass(rows: Rows, shape: Shape, hide_tail: bool, weight: float) -> Rows:
    """One more row, in which the whole completion is masked."""
    last = np.zeros((1, shape.prompt + shape.length), dtype=np.bool_)
    last[:, shape.prompt : shape.prompt + (shape.length if hide_tail else shape.scored)] = True
    one = np.ones(1)
    return Rows(
        np.concatenate([rows.masked, last]),
        np.concatenate([rows.scored, last[:, shape.prompt : shape.prompt + shape.scored]]),
        np.concatenate([rows.t, one]),
        np.concatenate([rows.q, one]),
        np.concatenate([rows.weight, one * weight]),
        rows.parts,
    )
