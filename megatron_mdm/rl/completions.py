"""Rollouts made: prompts in the data's order → completions of the engine that trains → rewards → advantages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.prompt_set import PromptDataset
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.diffusion.masking import Bools
from megatron_mdm.diffusion.randomness import Purpose
from megatron_mdm.engine.base import Engine
from megatron_mdm.generation.generate import generate_by_turns
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import Response, SpecialIds
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.rl.advantages import advantages
from megatron_mdm.rl.judge import Judge
from megatron_mdm.rl.noise import RlNoise
from megatron_mdm.rl.prompts import RolloutPrompts
from megatron_mdm.rl.rewards import Rewards
from megatron_mdm.rl.rollouts import Rollout, nothing, recorded
from megatron_mdm.rl.settings import decoding


class Completions:
    """Makes the rollouts of a run. Collective: every rank makes the same ones."""

    def __init__(
        self,
        config: RunConfig,
        data: PromptDataset,
        tokenizer: Tokenizer,
        engine: Engine,
        noise: RlNoise,
        rewards: Rewards,
        context: ParallelContext,
    ) -> None:
        self.rl = config.rl
        self.data = data
        self.engine = engine
        self.noise = noise
        self.context = context
        self.decoding = decoding(config)
        self.special = SpecialIds.of(tokenizer)
        self.prompts = RolloutPrompts(data, config.rl.prompts_per_rollout, config.seed)
        self.judge = Judge(rewards, self.prompts, tokenizer, context)

    def __call__(self, number: int) -> Rollout:
        """A rollout, without values."""
        if self.rl.replay:
            rollout = recorded(Path(self.rl.replay), number)
            self._check_recorded(rollout)
        else:
            rollout = self._drawn(number)
        return self._with_advantages(rollout)

    def _drawn(self, number: int) -> Rollout:
        rl = self.rl
        rows = self.prompts.rows(number)
        prompts = [prompt.ids for prompt in self.prompts.prompts(rows)]
        with self.engine.clock.measure("rollout"):
            enter(f"the completions of rollout {number}")
            responses = self._responses(number, prompts)
        tokens = np.array([response.tokens for response in responses], dtype=np.int64)
        ends = np.isin(tokens, self.special.end_ids)
        truncated: Bools = np.logical_not(ends.any(axis=1))
        lengths = np.where(truncated, tokens.shape[1], ends.argmax(1) + 1)
        with self.engine.clock.measure("reward"):
            limits = sum(reward.timeout for reward in rl.rewards)
            enter(f"the rewards of rollout {number}", extra_seconds=limits * len(tokens))
            scores = self.judge(rows.repeat(rl.num_generations), responses, rl.num_generations)
        return Rollout(
            number=np.array(number),
            rows=rows,
            prompt_lengths=np.array([len(prompt) for prompt in prompts]),
            prompts=np.concatenate([np.array(prompt, dtype=np.int64) for prompt in prompts]),
            tokens=tokens,
            denoising_steps=np.array([response.steps for response in responses]),
            lengths=lengths,
            truncated=truncated,
            scores=scores,
            rewards=self.judge.rewards.total(scores),
            advantages=nothing(),
            t=nothing(),
            weight=nothing(),
        )

    def _responses(self, number: int, prompts: Sequence[Sequence[int]]) -> list[Response]:
        """By completion. Each has an id of its own in the whole run, by which its chances are drawn: it is the same
        whatever the ranks and the batches."""
        size = self.rl.num_generations
        first = number * self.rl.num_completions
        by_id = {first + place: prompts[place // size] for place in range(self.rl.num_completions)}
        decode = partial(denoise, purpose=Purpose.ROLLOUT)
        found: dict[int, Response] = {}
        for share in generate_by_turns(
            self.engine, by_id, list(by_id), self.decoding, self.special, self.context, decode, shows_progress=False
        ):
            found.update(share)
        return [found[completion] for completion in by_id]

    def _with_advantages(self, rollout: Rollout) -> Rollout:
        shape = (rollout.num_groups, rollout.group_size)
        found = advantages(self.rl, rollout.rewards.reshape(shape), rollout.truncated.reshape(shape))
        t, weight = self.noise.times(int(rollout.number))
        return rollout.with_updates(found.reshape(-1), t, weight)

    def _check_recorded(self, rollout: Rollout) -> None:
        """Raise UserError where a recorded rollout is not of this run's prompts and numbers."""
        where = f"'rl.replay' {self.rl.replay}, rollout {int(rollout.number)}"
        found = (rollout.num_groups, rollout.group_size, rollout.tokens.shape[1])
        wanted = (self.rl.prompts_per_rollout, self.rl.num_generations, self.decoding.gen_length)
        if found != wanted:
            raise UserError(
                f"{where}: has {found[0]} prompts × {found[1]} completions of {found[2]} tokens, not "
                f"{wanted[0]} × {wanted[1]} of {wanted[2]} ('rl')"
            )
        for group, row in enumerate(rollout.rows.tolist()):
            known = row < len(self.data) and self.data.prompts[row].ids == rollout.prompt_of_group(group).tolist()
            if not known:
                raise UserError(f"{where}: its prompt {group} is not row {row} of 'data.train'")
