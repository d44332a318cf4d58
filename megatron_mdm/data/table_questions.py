"""Generated questions about small pipe tables in HiTab's form, answered in `\\boxed{…}`: data of the study, offline.

{"prompt": "Table: pets\\n| name | age | pet |\\n| Tom | 7 | cat |\\n…\\nQuestion: How old is Tom?",
 "response": "\\\\boxed{ 7 }"}
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import NamedTuple

NUM_ROWS = 4
MOST = 16  # every number in a table lies in 1 … MOST
_NAMES = ["Tom", "Ben", "Sam", "Max", "Paul", "John", "Leo", "David", "Ann", "Mary", "Lisa", "Emma", "Julia", "Kate"]
_PETS = ["cat", "dog", "fish", "bird", "horse", "mouse", "frog", "goat", "duck", "pig"]


class Table(NamedTuple):
    """Rows of distinct names, distinct numbers and distinct pets."""

    rows: tuple[tuple[str, int, str], ...]

    @classmethod
    def drawn(cls, rng: random.Random) -> Table:
        names = rng.sample(_NAMES, NUM_ROWS)
        ages = rng.sample(range(1, MOST + 1), NUM_ROWS)
        return cls(tuple(zip(names, ages, rng.sample(_PETS, NUM_ROWS), strict=True)))

    @property
    def text(self) -> str:
        lines = ["| name | age | pet |", *(f"| {name} | {age} | {pet} |" for name, age, pet in self.rows)]
        return "\n".join(lines)


# (table, random numbers) → a question, its answer, and what a text says of both
_Question = Callable[[Table, random.Random], tuple[str, str, str]]


def _age_of(table: Table, rng: random.Random) -> tuple[str, str, str]:
    name, age, _ = rng.choice(table.rows)
    return f"How old is {name}?", str(age), f"{name} is {age} years old."


def _pet_of(table: Table, rng: random.Random) -> tuple[str, str, str]:
    name, _, pet = rng.choice(table.rows)
    return f"What pet does {name} have?", pet, f"{name} has a {pet}."


def _owner_of(table: Table, rng: random.Random) -> tuple[str, str, str]:
    name, _, pet = rng.choice(table.rows)
    return f"Who has a {pet}?", name, f"A {pet} belongs to {name}."


def _who_is(table: Table, rng: random.Random) -> tuple[str, str, str]:
    name, age, _ = rng.choice(table.rows)
    return f"Who is {age} years old?", name, f"Of age {age} is {name}."


def _extreme(table: Table, rng: random.Random) -> tuple[str, str, str]:
    word, of = rng.choice([("oldest", max), ("youngest", min)])
    name = of(table.rows, key=lambda row: row[1])[0]
    return f"Who is the {word}?", name, f"The {word} is {name}."


def _pet_of_age(table: Table, rng: random.Random) -> tuple[str, str, str]:
    _, age, pet = rng.choice(table.rows)
    return f"What pet has the one of age {age}?", pet, f"The one of age {age} has a {pet}."


QUESTIONS: list[_Question] = [_age_of, _pet_of, _owner_of, _who_is, _extreme, _pet_of_age]


def generate(num: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """num questions, each with a table of its own (its field "table"), none of which is in exclude. A pure function of
    its arguments."""
    rng = random.Random(seed)
    seen = set(exclude)
    samples = list[dict[str, str]]()
    while len(samples) < num:
        table = Table.drawn(rng)
        question, answer, _ = rng.choice(QUESTIONS)(table, rng)
        if table.text not in seen:
            seen.add(table.text)
            # A number and a name behind a space are the same tokens here as in the table.
            prompt = f"Table: pets\n{table.text}\nQuestion: {question}"
            samples.append({"prompt": prompt, "response": f"\\boxed{{ {answer} }}", "table": table.text})
    return samples


def described(rng: random.Random, exclude: Collection[str], num_sentences: int = 4) -> dict[str, str]:
    """A sample of pretraining: a table, not one of exclude, and sentences that say what is in it."""
    table = Table.drawn(rng)
    while table.text in exclude:
        table = Table.drawn(rng)
    said = [question(table, rng)[2] for question in rng.sample(QUESTIONS, num_sentences)]
    return {"prompt": f"Table: pets\n{table.text}", "response": " ".join(said)}
