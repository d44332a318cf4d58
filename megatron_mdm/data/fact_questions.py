"""Invented people, what texts say of them, and multiple-choice questions: knowledge that only pretraining shows.

{"prompt": "Where does Mano live? One of: Rome, Oslo, Lima, Cairo", "response": "\\\\boxed{ Oslo }"}
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

NUM_OPTIONS = 4
_CONSONANTS, _VOWELS = "BDFGHJKLMNPRSTVZ", "aeiou"
_TAKEN = {"Lima", "Rome", "Lisa", "Sara", "Kate"}  # words of this file and of the other tasks


class _Attribute(NamedTuple):
    question: str
    sentences: tuple[str, ...]  # how texts say it
    values: tuple[str, ...]


_ATTRIBUTES = (
    _Attribute(
        "Where does {name} live?",
        ("Lives in {value}.", "The home is {value}."),
        ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Delhi", "Tokyo", "Bern", "Quito", "Dublin", "Prague", "Athens"),
    ),
    _Attribute(
        "What is the job of {name}?",
        ("Works as a {value}.", "The job is {value}."),
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
        ("Plays {value}.", "The game is {value}."),
        ("chess", "tennis", "golf", "rugby", "poker", "polo", "darts", "hockey", "squash", "bridge", "cricket", "dice"),
    ),
    _Attribute(
        "What does {name} drink?",
        ("Drinks {value}.", "The drink is {value}."),
        ("tea", "milk", "juice", "water", "wine", "beer", "cocoa", "coffee", "cider", "soup", "rum", "soda"),
    ),
)
NUM_ATTRIBUTES = len(_ATTRIBUTES)


class Person(NamedTuple):
    name: str
    values: tuple[str, ...]  # by attribute


def people(seed: int) -> list[Person]:
    """All of them, in an order of their own, with values drawn by the seed."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    names = sorted({first + last.lower() for first in syllables for last in syllables} - _TAKEN)
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
        prompt, right = _question(person, attribute, rng)
        if prompt not in seen:
            seen.add(prompt)
            # A value behind a space is the same token as in texts.
            samples.append({"prompt": prompt, "response": f"\\boxed{{ {right} }}"})
    return samples


def statements(known: Sequence[Person], rng: random.Random) -> dict[str, str]:
    """A sample of pretraining: what is known of one of these people. The name is given, since nothing predicts it."""
    person = rng.choice(known)
    said = [
        rng.choice(_ATTRIBUTES[attribute].sentences).format(value=person.values[attribute])
        for attribute in rng.sample(range(NUM_ATTRIBUTES), NUM_ATTRIBUTES)
    ]
    return {"prompt": f"{person.name}:", "response": " ".join(said)}


def quiz(known: Sequence[Person], rng: random.Random, exclude: Collection[str]) -> dict[str, str]:
    """A sample of pretraining: a question about one of these people, not one of exclude, and its answer."""
    while True:
        prompt, right = _question(rng.choice(known), rng.randrange(NUM_ATTRIBUTES), rng)
        if prompt not in exclude:
            return {"prompt": prompt, "response": f"The answer is {right}."}


def _question(person: Person, attribute: int, rng: random.Random) -> tuple[str, str]:
    """A prompt with its options, and the right one."""
    right = person.values[attribute]
    others = [value for value in _ATTRIBUTES[attribute].values if value != right]
    options = [right, *rng.sample(others, NUM_OPTIONS - 1)]
    rng.shuffle(options)
    return f"{_ATTRIBUTES[attribute].question.format(name=person.name)} One of: {', '.join(options)}", right
