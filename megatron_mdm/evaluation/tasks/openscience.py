"""OpenScience: multiple-choice questions whose reasoning ends in the letter of an option, `\\boxed{B}`."""

import re

from megatron_mdm.evaluation.tasks.boxed import boxed_content, cleaned

_LETTER = re.compile(r"\(?([A-J])\)?(?![A-Za-z])")
_SPOKEN = re.compile(r"(?i:answer)\s*(?i:is)?\s*:?\s*\(?([A-J])\)?(?![A-Za-z])")


def extract_answer(response: str) -> str | None:
    """The letter that begins the last \\boxed{…}; without one, that of the last "answer is B" or "Answer: B"."""
    content = boxed_content(response)
    if content is not None:
        match = _LETTER.match(cleaned(content))
        return match.group(1) if match else None
    spoken = _SPOKEN.findall(response)
    return spoken[-1] if spoken else None
