"""Generated questions about the cells of small pipe tables, of HiTab's kind, answered in `\\\\boxed{…}`: data of the
study, offline.

{"prompt": "Question: What is the sum of the ages in the third and first row?\\n| name | age |\\n| Tom | 7 |\\n…",
 "response": "3 + 7 = 10. \\\\boxed{ 10 }"}

Rows are asked for by their number. What a name's row says (How old is Ann?) a model of 1 M parameters has not begun to
look up after 50,000 tables, masked or autoregressive.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import NamedTuple

ROWS = ("first", "second", "third")
_COLUMNS = ("name", "age")
_ASKED = range(2, 9)  # ages in tables that are asked about: sums are in the word problems' range
_TOLD = range(1, 17)  # ages in tables of pretraining
_NAMES = ["Tom", "Ben", "Sam", "Max", "Paul", "John", "Leo", "David", "Ann", "Mary", "Lisa", "Emma", "Julia", "Kate"]


class Table(NamedTuple):
    """Rows of distinct names and distinct ages."""

    rows: tuple[tuple[str, int], ...]

    @classmethod
    def drawn(cls, rng: random.Random, ages: range) -> Table:
        return cls(tuple(zip(rng.sample(_NAMES, len(ROWS)), rng.sample(ages, len(ROWS)), strict=True)))

    @property
    def text(self) -> str:
        return "\n".join(["| name | age |", *(f"| {name} | {age} |" for name, age in self.rows)])


def generate(num: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """num questions, each with a table of its own (its field "table"), none of which is in exclude. A pure function of
    its arguments."""
    rng = random.Random(seed)
    seen = set(exclude)
    samples = list[dict[str, str]]()
    while len(samples) < num:
        table = Table.drawn(rng, _ASKED)
        first, second = rng.sample(range(len(ROWS)), 2)
        if table.text not in seen:
            seen.add(table.text)
            prompt = f"Question: What is the sum of the ages in the {ROWS[first]} and {ROWS[second]} row?\n{table.text}"
            a, b = table.rows[first][1], table.rows[second][1]
            # A number behind a space is the same token everywhere.
            samples.append(
                {"prompt": prompt, "response": f"{a} + {b} = {a + b}. \\boxed{{ {a + b} }}", "table": table.text}
            )
    return samples


def described(rng: random.Random, exclude: Collection[str]) -> dict[str, str]:
    """A sample of pretraining: a table, not one of exclude, and what one of its cells holds."""
    table = Table.drawn(rng, _TOLD)
    while table.text in exclude:
        table = Table.drawn(rng, _TOLD)
    row, column = rng.randrange(len(ROWS)), rng.randrange(len(_COLUMNS))
    prompt = f"Give the {_COLUMNS[column]} of the {ROWS[row]} row.\n{table.text}"
    return {"prompt": prompt, "response": f"The {_COLUMNS[column]} is {table.rows[row][column]}."}
