"""Whether a completion's final answer is right, by the rule of an evaluation's task: the reward is the metric."""

from __future__ import annotations

from functools import lru_cache

from megatron_mdm.config.errors import UserError
from megatron_mdm.evaluation.tasks import TASKS, Task
from megatron_mdm.rl.rewards.function import Function

_NUM_KEPT = 1 << 17  # references whose answers are remembered


def exact_match(task: str) -> Function:
    """1 where the completion has a final answer, and it is that of the record's own response (`reference`); else 0."""
    rule = _rule(task, "exact_match")

    @lru_cache(maxsize=_NUM_KEPT)
    def answer_of(reference: str | None) -> str:
        if not isinstance(reference, str):
            raise ValueError(f"the record has no response as text; mdm prepare task {task} makes it of public files")
        return rule.reference(reference)

    def function(completions: list[str], *, reference: list[str | None]) -> list[float | None]:
        answers = [answer_of(each) for each in reference]
        found = [rule.extract(text) for text in completions]
        return [float(mine is not None and rule.same(mine, right)) for mine, right in zip(found, answers)]

    return function


def format_match(task: str) -> Function:
    """1 where the completion has a final answer, right or wrong; else 0."""
    rule = _rule(task, "format_match")

    def function(completions: list[str]) -> list[float | None]:
        return [float(rule.extract(text) is not None) for text in completions]

    return function


def _rule(task: str, reward: str) -> Task:
    if task not in TASKS:
        raise UserError(f"reward {reward}: no task {task!r} ('rl.task'); it must be one of {', '.join(TASKS)}")
    return TASKS[task]
