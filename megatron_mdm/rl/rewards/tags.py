"""What stands in the last <answer>…</answer> of a completion."""

from __future__ import annotations

OPENING = "<answer>"
CLOSING = "</answer>"


def answer_of(text: str) -> str | None:
    """It, without white space around it; None where there is none. Of nested tags, the innermost."""
    end = text.rfind(CLOSING)
    begin = text.rfind(OPENING, 0, max(end, 0))
    return text[begin + len(OPENING) : end].strip() if begin >= 0 else None
