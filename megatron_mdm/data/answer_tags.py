"""The form of answers that d1, SPG and others ask for: reasoning and answer between tags."""

from __future__ import annotations

OPENING = "<answer>"
CLOSING = "</answer>"
# What asks for it, in front of a question
FORM = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

"""


def tagged_answer(text: str) -> str | None:
    """What stands in the last <answer>…</answer>, without white space around it; None where there is none. Of nested
    tags, the innermost."""
    end = text.rfind(CLOSING)
    begin = text.rfind(OPENING, 0, max(end, 0))
    return text[begin + len(OPENING) : end].strip() if begin >= 0 else None
