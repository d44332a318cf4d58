"""The data of the small study: fine-tuning, validation and test sets of three kinds of tasks, and one mix to
pretrain on, which shows none of their questions, and the facts of the test only as statements."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from megatron_mdm.data import fact_questions, table_questions, word_problems
from megatron_mdm.data.public_sets import Sets

NUM_PEOPLE = 100
_FAR = 1_000_003  # seeds of the texts' problems are apart from those of the sets
NUM_ASKED = 30  # of these people: those that quizzes of pretraining and questions of fine-tuning are about
MIX = {"problems": 0.35, "tables": 0.25, "statements": 0.25, "quizzes": 0.15}


class Sizes(NamedTuple):
    train: int = 640
    validation: int = 128
    test: int = 1000


def word_problem_sets(sizes: Sizes, seed: int) -> Sets:
    """Two steps of arithmetic with their chain of thought, `#### n`."""
    return _sets(sizes, seed, word_problems.generate, "question")


def table_sets(sizes: Sizes, seed: int) -> Sets:
    """Questions about tables, no table twice."""
    return _sets(sizes, seed, table_questions.generate, "table")


def fact_sets(sizes: Sizes, seed: int) -> Sets:
    """Multiple choice: training and validation ask about some people, the test about the others."""
    known = fact_questions.people(seed)[:NUM_PEOPLE]
    asked = {"test": known[NUM_ASKED:], "validation": known[:NUM_ASKED], "train": known[:NUM_ASKED]}
    sets: Sets = {}
    seen = set[str]()
    for index, (name, those) in enumerate(asked.items()):
        sets[name] = list(fact_questions.questions_about(those, getattr(sizes, name), 3 * seed + index, seen))
        seen.update(sample["prompt"] for sample in sets[name])
    return sets


TASKS: dict[str, Callable[[Sizes, int], Sets]] = {
    "arithmetic": word_problem_sets,
    "tables": table_sets,
    "facts": fact_sets,
}


def _sets(sizes: Sizes, seed: int, generate: Callable[[int, int, set[str]], list[dict[str, str]]], key: str) -> Sets:
    """key: of what no two samples share."""
    sets: Sets = {}
    seen = set[str]()
    for index, name in enumerate(("test", "validation", "train")):  # the test does not depend on the others' sizes
        sets[name] = list(generate(getattr(sizes, name), 3 * seed + index, seen))
        seen.update(sample[key] for sample in sets[name])
    return sets


class Held(NamedTuple):
    """What the mix must not show."""

    problems: set[str]
    tables: set[str]
    prompts: set[str]

    @classmethod
    def of(cls, tasks: dict[str, Sets]) -> Held:
        every = {name: [sample for part in sets.values() for sample in part] for name, sets in tasks.items()}
        return cls(
            {sample["question"] for sample in every["arithmetic"]},
            {sample["table"] for sample in every["tables"]},
            {sample["prompt"] for sample in every["facts"]},
        )


def pretraining_mix(num: int, held: Held, seed: int) -> list[dict[str, str]]:
    """num samples of the mix, each a prompt that is seen and a response that is learnt, as bases of published
    fine-tunings have been instructed. A pure function of its arguments."""
    rng = random.Random(f"texts {seed}")
    known = fact_questions.people(seed)[:NUM_PEOPLE]
    counts = {name: round(num * share) for name, share in MIX.items()}
    problems = iter(word_problems.generate(counts["problems"], 3 * seed + _FAR, held.problems))
    kinds: dict[str, Callable[[], dict[str, str]]] = {
        "problems": lambda: _problem(next(problems)),
        "tables": lambda: table_questions.described(rng, held.tables),
        "statements": lambda: fact_questions.statements(known, rng),
        "quizzes": lambda: fact_questions.quiz(known[:NUM_ASKED], rng, held.prompts),
    }
    samples = [kinds[name]() for name, count in counts.items() for _ in range(count)]
    rng.shuffle(samples)
    return samples


def _problem(sample: dict[str, str]) -> dict[str, str]:
    """A problem with its steps, whose last is the answer: without the mark of fine-tuning."""
    return {"prompt": sample["question"], "response": sample["answer"].partition(" ####")[0]}
