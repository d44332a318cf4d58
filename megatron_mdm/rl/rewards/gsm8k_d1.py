"""d1's reward for GSM8K (dllm-reasoning/d1, diffu-grpo/reward_func.py), whose prompts ask for tags:

    <reasoning>
    …
    </reasoning>
    <answer>
    18
    </answer>

The sum of five parts: a right answer 2, an answer of digits only 0.5, the strict format 0.5, the soft format 0.5, and
up to 0.5 by count of tags. The answer is what stands between the last <answer> and the </answer> behind it, or the
whole text without them. Other than there, digits are those from 0 to 9.
"""

from __future__ import annotations

import re

from megatron_mdm.data.answer_tags import CLOSING, OPENING
from megatron_mdm.rl.rewards.function import Function

_BEGIN = "<reasoning>\n"
_MIDDLE = "\n</reasoning>\n<answer>\n"
_END = "\n</answer>\n"
_SOFT_MIDDLE = re.compile(r"</reasoning>\s*<answer>")


def gsm8k_d1() -> Function:
    """d1's five rewards in one. The record's response (`reference`) holds the answer behind its first ####."""

    def function(completions: list[str], *, reference: list[str | None]) -> list[float | None]:
        return [_reward(text, _expected(response)) for text, response in zip(completions, reference)]

    return function


def _expected(reference: str | None) -> str:
    parts = reference.split("####") if isinstance(reference, str) else []
    if len(parts) < 2:
        raise ValueError("expected #### and the answer in the record's response")
    return parts[1].strip()


def _reward(text: str, expected: str) -> float:
    answer = text.split(OPENING)[-1].split(CLOSING)[0].strip()
    return (
        2.0 * (answer == expected)
        + 0.5 * (answer.isascii() and answer.isdigit())
        + 0.5 * _is_strict(text)
        + 0.5 * _is_soft(text)
        + _tag_count(text)
    )


def _is_strict(text: str) -> bool:
    """Whether the whole text is of that form, line by line."""
    middle = text.find(_MIDDLE, len(_BEGIN))
    is_framed = text.startswith(_BEGIN) and text.endswith(_END)
    return is_framed and 0 <= middle <= len(text) - len(_MIDDLE) - len(_END)


def _is_soft(text: str) -> bool:
    """Whether the text begins with the tags in their order, white space aside."""
    middle = _SOFT_MIDDLE.search(text, len("<reasoning>")) if text.startswith("<reasoning>") else None
    return middle is not None and text.find(CLOSING, middle.end()) >= 0


def _tag_count(text: str) -> float:
    """0.125 for each tag that stands there once with its line breaks, less 0.001 for every character behind the end:
    twice, since d1 takes it off with each of the answer's tags."""
    count = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - 0.001 * len(text.split(_END)[-1])
    if text.count("\n</answer>") == 1:
        count += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return count
