"""Countdown: an expression of all given numbers, each once, that gives the target (d1 and SPG have this reward)."""

from __future__ import annotations

from typing import Any

from megatron_mdm.data.answer_tags import tagged_answer
from megatron_mdm.evaluation.tasks.countdown import solves
from megatron_mdm.rl.rewards.function import Function

RIGHT = 1.0
WRONG = 0.1  # an answer of any kind, in its tags


def countdown(bare: bool = False, wrong: float = WRONG) -> Function:
    """1 where the last <answer>…</answer> is a right expression, `wrong` where it is another, 0 where there is none.

    Columns: `numbers`, a list of integers, and `target`. bare: the whole completion is the expression.
    """

    def function(completions: list[str], *, numbers: list[Any], target: list[Any]) -> list[float | None]:
        tasks = [_task(given, wanted) for given, wanted in zip(numbers, target)]
        return [
            _reward(text.strip() if bare else tagged_answer(text), *task, wrong)
            for text, task in zip(completions, tasks)
        ]

    return function


def _task(numbers: Any, target: Any) -> tuple[list[int], int]:
    if not isinstance(numbers, list | tuple) or not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"'numbers' must be a list of integers, not {str(numbers)[:60]}")
    if type(target) is not int:
        raise ValueError(f"'target' must be an integer, not {str(target)[:60]}")
    return sorted(numbers), target


def _reward(answer: str | None, numbers: list[int], target: int, wrong: float) -> float:
    if not answer:
        return 0.0 if answer is None else wrong
    return RIGHT if solves(answer, numbers, target) else wrong
