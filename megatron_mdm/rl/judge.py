"""Responses → rewards, each judged once, on one rank, and known to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.generation.settings import Response, SpecialIds
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.rl.prompts import RolloutPrompts
from megatron_mdm.rl.rewards import Rewards
from megatron_mdm.rl.rollouts import Ints


class Judge:
    """Asks a run's reward functions."""

    def __init__(
        self, rewards: Rewards, prompts: RolloutPrompts, tokenizer: Tokenizer, context: ParallelContext
    ) -> None:
        """prompts: of the data that rows are of."""
        self.rewards = rewards
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.special = SpecialIds.of(tokenizer)
        self.context = context

    def __call__(self, rows: Ints, responses: Sequence[Response], group_size: int) -> Floats:
        """Scores [n, F] of the responses [n] to these rows [n] of the data, group by group. Collective. Raises
        UserError, on every rank, where a function fails on any.

        Each data-parallel rank judges whole groups; of its tensor- and pipeline-parallel ranks one does, since a
        function may give another answer when it is asked again.
        """
        turns = np.arange(len(rows)) // group_size % self.context.layout.data
        mine = np.flatnonzero(turns == self.context.data_rank).tolist()
        answer: tuple[list[int], list[list[float]], str] = ([], [], "")
        if mine and self.context.tensor_rank == 0 and self.context.pipeline_rank == 0:
            try:
                answer = (mine, self._scores(rows[mine], [responses[place] for place in mine]).tolist(), "")
            except UserError as error:
                answer = ([], [], str(error))
        answers: list[Any] = gather_objects(answer, self.context)
        if problem := next((problem for *_, problem in answers if problem), ""):
            raise UserError(problem)
        scores = np.zeros((len(rows), len(self.rewards.names)))
        for places, values, _ in answers:
            if places:
                scores[places] = values
        return scores

    def _scores(self, rows: Ints, responses: Sequence[Response]) -> Floats:
        tokens = [response.tokens for response in responses]
        return self.rewards(
            self.prompts.texts(rows),
            [self.tokenizer.decode(ids) for ids in tokens],
            self.prompts.columns(rows),
            tokens=[list(self.tokenizer.up_to_end(ids)) for ids in tokens],
            steps=[response.steps for response in responses],
            truncated=[not any(self.tokenizer.is_end(token) for token in ids) for ids in tokens],
        )
