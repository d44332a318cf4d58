"""4×4 sudoku: digits row by row, 0 for an empty cell (the rewards of d1 and SPG)."""

from __future__ import annotations

import re
from typing import Any

from megatron_mdm.data.answer_tags import tagged_answer
from megatron_mdm.evaluation.tasks.sudoku import NUM_CELLS, digits_of
from megatron_mdm.rl.rewards.function import Function


def sudoku4(bare: bool = False) -> Function:
    """The share of the puzzle's empty cells that are right. Of the digits in the last <answer>…</answer>, or, bare, in
    the whole completion, the first 16 count. Columns: `puzzle` and `solution`."""

    def function(completions: list[str], *, puzzle: list[Any], solution: list[Any]) -> list[float | None]:
        return [_share(_digits(text, bare), *_task(*task)) for text, *task in zip(completions, puzzle, solution)]

    return function


def sudoku4_exact(bare: bool = False) -> Function:
    """1 where all 16 cells are right, else 0; as sudoku4 otherwise."""

    def function(completions: list[str], *, puzzle: list[Any], solution: list[Any]) -> list[float | None]:
        tasks = [_task(*task) for task in zip(puzzle, solution)]
        return [float(_digits(text, bare) == solved) for text, (_, solved) in zip(completions, tasks)]

    return function


def _task(puzzle: Any, solution: Any) -> tuple[str, str]:
    for name, value, digits in (("puzzle", puzzle, "0-4"), ("solution", solution, "1-4")):
        if not isinstance(value, str) or not re.fullmatch(f"[{digits}]{{{NUM_CELLS}}}", value):
            raise ValueError(f"'{name}' must be a text of {NUM_CELLS} digits {digits}, not {str(value)[:60]!r}")
    if "0" not in puzzle:
        raise ValueError("'puzzle' has no empty cell (0)")
    return puzzle, solution


def _digits(text: str, bare: bool) -> str:
    return digits_of(text if bare else tagged_answer(text) or "")


def _share(digits: str, puzzle: str, solution: str) -> float:
    empty = [cell for cell in range(NUM_CELLS) if puzzle[cell] == "0"]
    return sum(digits[cell] == solution[cell] for cell in empty) / len(empty)
