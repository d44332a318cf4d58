"""4×4 sudoku with one solution each. Generated; split by solved grid, of which there are 288.

    1 0 3 0 3 0 1 4 0 2 4 3 4 0 2 0:  →  <answer>1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1</answer>

Puzzles of one grid have one answer: where they stand in training and in the test (as in d1's files), the test measures
what is remembered.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.json_files import Record
from megatron_mdm.data.puzzles import SPLITS, Puzzle, check_sizes, record_of

NUM_CELLS = 16
NUM_EMPTY = (4, 10)  # cells, at least and at most
GRIDS_OF = {"train": 200, "validation": 30, "test": 58}  # SPG's 200 of 288 for training
MOST_OF_A_GRID = 500  # puzzles: far less than there are


def generate(sizes: Mapping[str, int], seed: int, style: str = "short") -> dict[str, list[Record]]:
    """Puzzles by split, no two alike, and no solved grid in two splits. A pure function of its arguments. Raises
    UserError for sizes there is no room for."""
    check_sizes(sizes, {name: MOST_OF_A_GRID * count for name, count in GRIDS_OF.items()}, "puzzles")
    rng = random.Random(seed)
    order = rng.sample(range(len(grids())), len(grids()))
    splits: dict[str, list[Record]] = {}
    first = 0
    for name in SPLITS:
        own = order[first : first + GRIDS_OF[name]]
        first += len(own)
        puzzles: dict[str, str] = {}
        while len(puzzles) < sizes[name]:
            solution = grids()[own[len(puzzles) % len(own)]]
            puzzles.setdefault(_puzzle(rng, solution), _text(solution))
        splits[name] = [_record(puzzle, solution, style) for puzzle, solution in puzzles.items()]
        rng.shuffle(splits[name])
    return splits


@lru_cache(maxsize=1)
def grids() -> NDArray[np.int8]:
    """All solved grids [288, 16], row by row."""
    rows = list(permutations(range(1, 5)))
    found = [
        (*a, *b, *c, *d)
        for a in rows
        for b in rows
        if _goes_below(a, b)
        for c in rows
        for d in rows
        if _goes_below(c, d)
    ]
    solved = [grid for grid in found if all(len({*grid[column::4]}) == 4 for column in range(4))]
    return np.array(solved, dtype=np.int8)


def _goes_below(above: tuple[int, ...], below: tuple[int, ...]) -> bool:
    """Whether two rows fill their two boxes."""
    return all(len({*above[half : half + 2], *below[half : half + 2]}) == 4 for half in (0, 2))


def _puzzle(rng: random.Random, solution: NDArray[np.int8]) -> str:
    """The solution with cells left empty, in random order, as long as no other grid fits what is left."""
    wanted = rng.randint(*NUM_EMPTY)
    others = grids() != solution  # [288, 16]
    given = np.ones(NUM_CELLS, dtype=np.bool_)
    for cell in rng.sample(range(NUM_CELLS), NUM_CELLS):
        given[cell] = False
        is_unique = int((~(others & given).any(axis=1)).sum()) == 1
        given[cell] = not is_unique
        if NUM_CELLS - int(given.sum()) == wanted:
            break
    return _text(solution * given)


def _text(cells: NDArray[np.int8]) -> str:
    return "".join(map(str, cells.tolist()))


def _record(puzzle: str, solution: str, style: str) -> Record:
    return record_of(
        Puzzle(
            short=f"{' '.join(puzzle)}:",
            long=(
                "Solve this 4x4 sudoku, which is given row by row as 16 digits, 0 for an empty cell. Every row, every "
                "column and every 2x2 box holds each of the digits 1 to 4 once. Put the 16 digits of the solved grid "
                f"into <answer></answer>.\n\n{puzzle}"
            ),
            steps="",
            answer=" ".join(solution) if style == "short" else solution,
            columns={"puzzle": puzzle, "solution": solution},
        ),
        style,
    )
