"""Generated questions about the cells of small pipe tables, of HiTab's kind, answered in `\\\\boxed{…}`: data of the
study, offline.

{"prompt": "Question: What age is in the second row?\\n| name | age |\\n| Tom | 7 |\\n| Ann | 12 |\\n| Leo | 3 |",
 "response": "\\\\boxed{ 12 }"}

A cell is asked for by its row's number and its column. What a name's row says (How old is Ann?) a model of 1 M
parameters has not begun to look up after 50,000 tables, masked or autoregressive.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import NamedTuple

ROWS = ("first", "second", "third")
_QUESTIONS = {"name": "Who is", "age": "What age is"}
MOST = 16  # every number in a table lies in 1 … MOST
_NAMES = ["Tom", "Ben", "Sam", "Max", "Paul", "John", "Leo", "David", "Ann", "Mary", "Lisa", "Emma", "Julia", "Kate"]


class Table(NamedTuple):
    """Rows of distinct names and distinct ages."""

    rows: tuple[tuple[str, int], ...]

    @classmethod
    def drawn(cls, rng: random.Random) -> Table:
        return cls(tuple(zip(rng.sample(_NAMES, len(ROWS)), rng.sample(range(1, MOST + 1), len(ROWS)), strict=True)))

    @property
    def text(self) -> str:
        return "\n".join(["| name | age |", *(f"| {name} | {age} |" for name, age in self.rows)])

    def cell(self, rng: random.Random) -> tuple[str, str, str]:
        """(row, column, value) of one, drawn."""
        row, column = rng.randrange(len(ROWS)), rng.choice(list(_QUESTIONS))
        return ROWS[row], column, str(self.rows[row][column == "age"])


def generate(num: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """num questions, each with a table of its own (its field "table"), none of which is in exclude. A pure function of
    its arguments."""
    rng = random.Random(seed)
    seen = set(exclude)
    samples = list[dict[str, str]]()
    while len(samples) < num:
        table = Table.drawn(rng)
        row, column, value = table.cell(rng)
        if table.text not in seen:
            seen.add(table.text)
            prompt = f"Question: {_QUESTIONS[column]} in the {row} row?\n{table.text}"
            # A value behind a space is the same token here as in the table.
            samples.append({"prompt": prompt, "response": f"\\boxed{{ {value} }}", "table": table.text})
    return samples


def described(rng: random.Random, exclude: Collection[str]) -> dict[str, str]:
    """A sample of pretraining: a cell of a table, not one of exclude, asked for and answered in other words."""
    table = Table.drawn(rng)
    while table.text in exclude:
        table = Table.drawn(rng)
    row, column, value = table.cell(rng)
    return {"prompt": f"Give the {column} of the {row} row.\n{table.text}", "response": f"The {column} is {value}."}
