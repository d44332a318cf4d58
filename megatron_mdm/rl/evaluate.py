"""Validation while a policy is trained: greedy answers to prompts that are held out."""

from __future__ import annotations

from typing import cast

import numpy as np

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.prompt_set import REFERENCE, PromptDataset
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.engine.base import Engine, Forward
from megatron_mdm.evaluation.intervals import wilson_interval
from megatron_mdm.evaluation.tasks import TASKS
from megatron_mdm.generation.generate import generate
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.rl.judge import Judge
from megatron_mdm.rl.prompts import RolloutPrompts
from megatron_mdm.rl.rewards import Rewards
from megatron_mdm.rl.settings import greedy


class GreedyAnswers:
    """An evaluation.validation.Validation: the first prompts of the validation data, answered greedily, judged by the
    rewards and, where every record has a reference with a final answer, by exact match with it (`rl.task`)."""

    def __init__(
        self,
        config: RunConfig,
        data: PromptDataset,
        tokenizer: Tokenizer,
        rewards: Rewards,
        context: ParallelContext,
    ) -> None:
        self.task = TASKS[config.rl.task]
        self.tokenizer = tokenizer
        self.context = context
        self.decoding = greedy(config)
        self.rows = np.arange(min(config.rl.num_eval_prompts, len(data)))
        self.prompts = [prompt.ids for prompt in data.prompts[: len(self.rows)]]
        self.judge = Judge(rewards, RolloutPrompts(data, len(self.rows), config.seed), tokenizer, context)
        self.answers = self._answers(data)
        self.record: dict[str, float] = {}  # of the last call

    def __call__(self, engine: Forward) -> float:
        """What is to become less: the share that is wrong, or, without references, the mean reward's negative.
        Collective."""
        special = self.judge.special
        responses = generate(
            cast(Engine, engine), self.prompts, self.decoding, special, self.context, shows_progress=False
        )
        rewards = self.judge.rewards.total(self.judge(self.rows, responses, 1))
        self.record = {"validation_reward": float(rewards.mean())}
        if not self.answers:
            return -self.record["validation_reward"]
        predicted = [self.task.extract(self.tokenizer.decode(response.tokens)) for response in responses]
        right = sum(
            found is not None and self.task.same(found, answer) for found, answer in zip(predicted, self.answers)
        )
        low, high = wilson_interval(right, len(self.answers))
        share = right / len(self.answers)
        self.record |= {"exact_match": share, "exact_match_low": low, "exact_match_high": high}
        return 1.0 - share

    def _answers(self, data: PromptDataset) -> list[str]:
        """The final answers of the references; empty where one has none."""
        references = [record[REFERENCE] for record in data.columns[: len(self.rows)]]
        try:
            return [self.task.reference(reference or "") for reference in references]
        except ValueError:
            return []
