"""GSM8K's answer format: a chain of thought that ends in `#### number`."""

import re

_ANSWER = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)")


def extract_answer(response: str) -> str | None:
    """The number after the last `####`, without thousands separators and trailing zeros of a fraction."""
    matches = _ANSWER.findall(response)
    if not matches:
        return None
    number = matches[-1].replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number
