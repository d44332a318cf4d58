"""Countdown (data/countdown.py): an expression of all given numbers, each once, that gives the target.

A solved response says both: its expression's numbers are the given ones, and its value is the target.
"""

import re
from fractions import Fraction

from megatron_mdm.data.answer_tags import tagged_answer
from megatron_mdm.evaluation.tasks.expressions import MAX_LENGTH, value_of

_INTEGER = re.compile("[0-9]+")
_FRACTION = re.compile(r"\.[0-9]")


def extract_answer(response: str) -> str | None:
    """What stands in the last <answer>…</answer>; None where nothing does."""
    return tagged_answer(response) or None


def reference_answer(response: str) -> str:
    """The expression of a solved response. Raises ValueError where there is none."""
    answer = tagged_answer(response)
    if not answer:
        raise ValueError("expected a solution in <answer>…</answer>")
    value_of(answer)
    return answer


def numbers_of(expression: str) -> list[int]:
    """The whole numbers that stand in it, in ascending order. Raises ValueError where it is too long, or has others:
    3.5 is not made of 3 and 5."""
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    if _FRACTION.search(expression):
        raise ValueError("a number that is not whole")
    return sorted(map(int, _INTEGER.findall(expression)))


def solves(expression: str, numbers: list[int], target: int | Fraction) -> bool:
    """Whether it has the numbers (ascending), each once and no other, and the target as its value."""
    try:
        return numbers_of(expression) == numbers and value_of(expression) == target
    except ValueError:
        return False


def same(predicted: str, reference: str) -> bool:
    """Whether an expression solves what the reference solves."""
    try:
        return solves(predicted, numbers_of(reference), value_of(reference))
    except ValueError:
        return False
