"""MATH: an answer in \\boxed{…}, and d1's reward for where it stands."""

from __future__ import annotations

import re

from megatron_mdm.data.answer_tags import CLOSING, OPENING
from megatron_mdm.evaluation.tasks.markup import boxed_content, plain
from megatron_mdm.evaluation.tasks.numbers import parse_number
from megatron_mdm.rl.rewards.function import Function

_LONGEST = 1000  # characters of an answer
_NO_MEANING = re.compile(r"\\left|\\right|\\displaystyle|[\s$]")


def math_boxed(form: bool = True) -> Function:
    """2 where the last \\boxed{…} is that of the record's response (`reference`; the whole of it, without one). And for
    the form, as d1 and SPG have it: a box in <answer>…</answer> 1, these tags without it 0.75, a box elsewhere 0.5,
    neither 0.25. form: whether that is added.

    Answers are equal as numbers, or as texts without white space, dollars and LaTeX's wrappers.
    """

    def function(completions: list[str], *, reference: list[str | None]) -> list[float | None]:
        answers = [_expected(each) for each in reference]
        return [
            2.0 * _is_same(boxed_content(text), answer) + (_form(text) if form else 0.0)
            for text, answer in zip(completions, answers)
        ]

    return function


def _expected(reference: str | None) -> str:
    if not isinstance(reference, str):
        raise ValueError("the record has no response as text")
    content = boxed_content(reference)
    answer = reference if content is None else content
    if not answer.strip() or len(answer) > _LONGEST:
        raise ValueError("expected an answer in \\boxed{…} in the record's response")
    return answer


def _is_same(found: str | None, expected: str) -> bool:
    if found is None or len(found) > _LONGEST:
        return False
    numbers = [parse_number(text, slash=True) for text in (found, expected)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    mine, right = (
        _NO_MEANING.sub("", plain(_NO_MEANING.sub("", text))).removesuffix(".") for text in (found, expected)
    )
    return mine == right


def _form(text: str) -> float:
    begin = text.find(OPENING)
    end = text.find(CLOSING, begin) if begin >= 0 else -1
    has_tags = end >= 0
    has_box = "\\boxed" in (text[begin:end] if has_tags else text)
    return 0.25 + 0.5 * has_tags + 0.25 * has_box
