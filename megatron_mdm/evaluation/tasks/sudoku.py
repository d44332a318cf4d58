"""4×4 sudoku (data/sudoku.py): 16 digits, row by row, all of which must be right."""

import re

from megatron_mdm.data.answer_tags import tagged_answer

NUM_CELLS = 16
_DIGIT = re.compile("[0-9]")


def extract_answer(response: str) -> str | None:
    """The first 16 digits in the last <answer>…</answer>, 0 where there are fewer; None where there is none."""
    answer = tagged_answer(response)
    return digits_of(answer) if answer else None


def reference_answer(response: str) -> str:
    """The grid of a solved response. Raises ValueError where it is none."""
    digits = extract_answer(response)
    if digits is None or set(digits) - set("1234"):
        raise ValueError("expected a solved grid, 16 digits 1 to 4, in <answer>…</answer>")
    return digits


def digits_of(text: str) -> str:
    """The first 16 digits of a text, 0 in place of those that it lacks."""
    found = []
    for match in _DIGIT.finditer(text):
        found.append(match[0])
        if len(found) == NUM_CELLS:
            break
    return "".join(found).ljust(NUM_CELLS, "0")
