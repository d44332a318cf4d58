"""Invented people, what texts say of them, and multiple-choice questions: knowledge that only pretraining shows.

{"prompt": "Where does Nora Blake live?\\nA. Rome\\nB. Oslo\\nC. Lima\\nD. Cairo", "response": "\\\\boxed{B}"}
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

LETTERS = "ABCD"
_FIRST = [
    "Nora",
    "Otto",
    "Iris",
    "Hugo",
    "Vera",
    "Carl",
    "Olga",
    "Emil",
    "Ruth",
    "Karl",
    "Anna",
    "Luis",
    "Rosa",
    "Erik",
]
_FIRST += ["Elsa", "Ivan", "Mona", "Hans", "Tina", "Noah"]
_LAST = [
    "Blake",
    "Stone",
    "Frost",
    "Reed",
    "Hill",
    "Wolf",
    "Ford",
    "Park",
    "Lane",
    "West",
    "Bell",
    "Cook",
    "Dale",
    "Gray",
]
_LAST += ["Hart", "King", "Moss", "Nash", "Page", "Rice"]


class _Attribute(NamedTuple):
    question: str
    sentences: tuple[str, ...]  # how texts say it
    values: tuple[str, ...]


_ATTRIBUTES = (
    _Attribute(
        "Where does {name} live?",
        ("{name} lives in {value}.", "The home of {name} is {value}.", "{value} is where {name} lives."),
        ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Delhi", "Tokyo", "Bern", "Quito", "Dublin", "Prague", "Athens"),
    ),
    _Attribute(
        "What is the job of {name}?",
        ("{name} is a {value}.", "The job of {name} is {value}.", "{name} works as a {value}."),
        (
            "baker",
            "nurse",
            "pilot",
            "judge",
            "miner",
            "tailor",
            "clerk",
            "painter",
            "farmer",
            "singer",
            "dancer",
            "writer",
        ),
    ),
    _Attribute(
        "What does {name} play?",
        ("{name} plays {value}.", "The game of {name} is {value}.", "{value} is what {name} plays."),
        ("chess", "tennis", "golf", "rugby", "poker", "polo", "darts", "hockey", "squash", "bridge", "cricket", "dice"),
    ),
    _Attribute(
        "What does {name} drink?",
        ("{name} drinks {value}.", "The drink of {name} is {value}.", "{value} is what {name} drinks."),
        ("tea", "milk", "juice", "water", "wine", "beer", "cocoa", "coffee", "cider", "soup", "rum", "soda"),
    ),
)
NUM_ATTRIBUTES = len(_ATTRIBUTES)
MOST_PEOPLE = len(_FIRST) * len(_LAST)


class Person(NamedTuple):
    name: str
    values: tuple[str, ...]  # by attribute


def people(seed: int) -> list[Person]:
    """All of them, in an order of their own, with values drawn by the seed."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    rng.shuffle(names)
    return [Person(name, tuple(rng.choice(attribute.values) for attribute in _ATTRIBUTES)) for name in names]


def questions_about(
    known: Sequence[Person], num: int, seed: int, exclude: Collection[str] = ()
) -> list[dict[str, str]]:
    """num questions, every fact of these people equally often but for one, with other options each time; no prompt is
    in exclude. A pure function of its arguments."""
    rng = random.Random(seed)
    seen = set(exclude)
    facts = [(person, attribute) for person in known for attribute in range(NUM_ATTRIBUTES)]
    rng.shuffle(facts)
    samples = list[dict[str, str]]()
    while len(samples) < num:
        person, attribute = facts[len(samples) % len(facts)]
        sample = _question(person, attribute, rng)
        if sample["prompt"] not in seen:
            seen.add(sample["prompt"])
            samples.append(sample)
    return samples


def statements(known: Sequence[Person], rng: random.Random, num_facts: int = 6) -> dict[str, str]:
    """A sample of pretraining: what is said of two of these people, all of it to be learnt."""
    said = []
    for person in rng.sample(known, 2):
        for attribute in rng.sample(range(NUM_ATTRIBUTES), num_facts // 2):
            sentence = rng.choice(_ATTRIBUTES[attribute].sentences)
            said.append(sentence.format(name=person.name, value=person.values[attribute]))
    return {"prompt": "People:", "response": " ".join(said)}


def quiz(known: Sequence[Person], rng: random.Random, exclude: Collection[str]) -> dict[str, str]:
    """A sample of pretraining: a question about one of these people, not one of exclude, and its answer."""
    while True:
        sample = _question(rng.choice(known), rng.randrange(NUM_ATTRIBUTES), rng)
        if sample["prompt"] not in exclude:
            letter = sample["response"].removeprefix("\\boxed{").removesuffix("}")
            return {"prompt": sample["prompt"], "response": f"Answer ({letter})"}


def _question(person: Person, attribute: int, rng: random.Random) -> dict[str, str]:
    right = person.values[attribute]
    others = [value for value in _ATTRIBUTES[attribute].values if value != right]
    options = [right, *rng.sample(others, len(LETTERS) - 1)]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    prompt = "\n".join([_ATTRIBUTES[attribute].question.format(name=person.name), *lines])
    return {"prompt": prompt, "response": f"\\boxed{{{LETTERS[options.index(right)]}}}"}
