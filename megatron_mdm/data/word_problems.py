"""Generated two-step arithmetic word problems in GSM8K's format: the quickstart's data, offline and with known answers.

{"question": "Tom has 8 apples. He buys 6 more and then …?", "answer": "8 + 6 = 14. 14 - 5 = 9. #### 9"}

Comparisons, with operators that the others do not have, are for tuning a model that has learnt the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import NamedTuple

LARGEST = 16  # every number in a question or an answer lies in 1 … LARGEST
LARGEST_STEP = 6  # the second operand of a sum or a difference lies in 2 … LARGEST_STEP

_HE = ["Tom", "Ben", "Sam", "Max", "Paul", "John", "Leo", "David"]
_SHE = ["Ann", "Mary", "Lisa", "Emma", "Julia", "Kate", "Sara", "Nina"]
_ITEMS = [
    "apples",
    "pears",
    "plums",
    "eggs",
    "cookies",
    "candies",
    "marbles",
    "stickers",
    "stamps",
    "cards",
    "shells",
    "pens",
    "pencils",
    "books",
    "coins",
]
_GOODS = ["cup", "pen", "book", "ball", "hat", "toy", "cake", "lamp"]
_BOXES = ["boxes", "bags", "packs", "baskets"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_GAINS = ["buys {n} more", "finds {n} more", "gets {n} more", "gets {n} more from {other}"]
_LOSSES = ["sells {n}", "loses {n}", "gives {n} to {other}", "gives away {n}"]
_PLACES = [  # a place, its preposition, leaving, coming
    ("bus", "on", "get off", "get on"),
    ("train", "on", "get off", "get on"),
    ("library", "in", "leave", "come in"),
    ("pool", "in", "leave", "come in"),
]


class _OutOfRange(Exception):
    """A draw whose numbers leave the allowed range."""


class _Words(NamedTuple):
    name: str
    he: str  # He or She
    other: str
    third: str
    items: str
    boxes: str
    good: str
    good2: str


_Template = Callable[[random.Random, _Words], tuple[str, str]]


def generate(num: int, seed: int, exclude: Collection[str] = (), kind: str = "arithmetic") -> list[dict[str, str]]:
    """num problems of a kind (of PROBLEMS) with distinct questions, none of them in exclude. A pure function of its
    arguments."""
    rng = random.Random(seed)
    seen = set(exclude)
    problems: list[dict[str, str]] = []
    while len(problems) < num:
        name, other, third = rng.sample(_HE + _SHE, 3)
        he = "He" if name in _HE else "She"
        words = _Words(name, he, other, third, rng.choice(_ITEMS), rng.choice(_BOXES), *rng.sample(_GOODS, 2))
        try:
            question, answer = rng.choice(PROBLEMS[kind])(rng, words)
        except _OutOfRange:
            continue
        if question not in seen:
            seen.add(question)
            problems.append({"question": question, "answer": answer})
    return problems


def _solve(a: int, first: str, b: int, second: str, c: int) -> str:
    """The two steps of (a first b) second c, and the answer line."""
    first_text, middle = _step(a, first, b)
    second_text, end = _step(middle, second, c)
    return f"{first_text} {second_text} #### {end}"


def _step(a: int, operator: str, b: int) -> tuple[str, int]:
    if operator == "/" and a % b:
        raise _OutOfRange
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b, "max": max(a, b), "min": min(a, b)}[operator]
    if not 1 <= value <= LARGEST:
        raise _OutOfRange
    return f"{a} {operator} {b} = {value}.", value


def _small(rng: random.Random) -> int:
    return rng.randint(2, LARGEST_STEP)


def _change(rng: random.Random, words: _Words, sign: str, n: int) -> str:
    return rng.choice(_GAINS if sign == "+" else _LOSSES).format(n=n, other=words.other)


def _two_changes(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(5, LARGEST)
    b = _small(rng)
    c = _small(rng)
    s1 = rng.choice("+-")
    s2 = rng.choice("+-")
    question = (
        f"{w.name} has {a} {w.items}. {w.he} {_change(rng, w, s1, b)} and then {_change(rng, w, s2, c)}. "
        f"How many {w.items} does {w.name} have now?"
    )
    return question, _solve(a, s1, b, s2, c)


def _together(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(3, LARGEST)
    b = _small(rng)
    c = _small(rng)
    question = (
        f"{w.name} has {a} {w.items} and {w.other} has {b}. They give {c} of them to {w.third}. "
        f"How many {w.items} do they have left together?"
    )
    return question, _solve(a, "+", b, "-", c)


def _comparison(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(5, LARGEST)
    b = _small(rng)
    c = _small(rng)
    s1 = rng.choice("+-")
    s2 = rng.choice("+-")
    word = {"+": "more", "-": "fewer"}
    question = (
        f"{w.name} has {a} {w.items}. {w.other} has {b} {word[s1]} than {w.name} and {w.third} has {c} {word[s2]} "
        f"than {w.other}. How many {w.items} does {w.third} have?"
    )
    return question, _solve(a, s1, b, s2, c)


def _boxes_and_loss(rng: random.Random, w: _Words) -> tuple[str, str]:
    b = _small(rng)
    c = _small(rng)
    d = _small(rng)
    question = (
        f"{w.name} buys {b} {w.boxes} with {c} {w.items} each. {w.he} {_change(rng, w, '-', d)}. "
        f"How many {w.items} does {w.name} have left?"
    )
    return question, _solve(b, "*", c, "-", d)


def _boxes_and_rest(rng: random.Random, w: _Words) -> tuple[str, str]:
    b = _small(rng)
    c = _small(rng)
    d = _small(rng)
    question = (
        f"{w.name} fills {b} {w.boxes} with {c} {w.items} each and has {d} {w.items} left over. "
        f"How many {w.items} does {w.name} have?"
    )
    return question, _solve(b, "*", c, "+", d)


def _shopping(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(10, LARGEST)
    b = _small(rng)
    c = _small(rng)
    question = (
        f"{w.name} has {a} dollars. {w.he} buys a {w.good} for {b} dollars and a {w.good2} for {c} dollars. "
        f"How many dollars does {w.name} have left?"
    )
    return question, _solve(a, "-", b, "-", c)


def _cost(rng: random.Random, w: _Words) -> tuple[str, str]:
    b = _small(rng)
    c = _small(rng)
    d = _small(rng)
    question = (
        f"{w.name} buys {b} {w.good}s for {c} dollars each and a {w.good2} for {d} dollars. "
        f"How many dollars does {w.name} spend?"
    )
    return question, _solve(b, "*", c, "+", d)


def _reading(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(10, LARGEST)
    b = _small(rng)
    c = _small(rng)
    day = rng.randrange(6)
    question = (
        f"A book has {a} pages. {w.name} reads {b} pages on {_DAYS[day]} and {c} pages on {_DAYS[day + 1]}. "
        "How many pages are left?"
    )
    return question, _solve(a, "-", b, "-", c)


def _visitors(rng: random.Random, _: _Words) -> tuple[str, str]:
    a = rng.randint(5, LARGEST)
    b = _small(rng)
    c = _small(rng)
    place, preposition, leave, come = rng.choice(_PLACES)
    moves = [(leave, "-"), (come, "+")]
    rng.shuffle(moves)
    (verb1, s1), (verb2, s2) = moves
    question = (
        f"There are {a} people {preposition} a {place}. First {b} people {verb1} and then {c} people {verb2}. "
        f"How many people are {preposition} the {place} now?"
    )
    return question, _solve(a, s1, b, s2, c)


def _times(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(2, LARGEST // 2)
    c = _small(rng)
    sign = rng.choice("+-")
    word, factor = rng.choice([("twice", 2), ("3 times", 3)])
    change = _change(rng, w._replace(other=w.third), sign, c)
    question = (
        f"{w.name} has {a} {w.items}. {w.other} has {word} as many {w.items} as {w.name} and then {change}. "
        f"How many {w.items} does {w.other} have now?"
    )
    return question, _solve(factor, "*", a, sign, c)


def _sharing(rng: random.Random, w: _Words) -> tuple[str, str]:
    each = _small(rng)
    boxes = _small(rng)
    b = _small(rng)
    sign = rng.choice("+-")
    a = each * boxes - b if sign == "+" else each * boxes + b
    if not 2 <= a <= LARGEST:
        raise _OutOfRange
    what = "them" if sign == "+" else "the rest"
    question = (
        f"{w.name} has {a} {w.items} and {_change(rng, w, sign, b)}. {w.he} puts {what} into {boxes} {w.boxes} "
        f"equally. How many {w.items} are in each of the {w.boxes}?"
    )
    return question, _solve(a, sign, b, "/", boxes)


def _ages(rng: random.Random, w: _Words) -> tuple[str, str]:
    a = rng.randint(5, LARGEST)
    b = _small(rng)
    c = _small(rng)
    sign = rng.choice("+-")
    word = {"+": "older", "-": "younger"}[sign]
    question = (
        f"{w.name} is {a} years old. {w.other} is {b} years {word} than {w.name}. "
        f"How old will {w.other} be in {c} years?"
    )
    return question, _solve(a, sign, b, "+", c)


def _saving(rng: random.Random, w: _Words) -> tuple[str, str]:
    b = _small(rng)
    c = _small(rng)
    d = _small(rng)
    question = (
        f"{w.name} saves {b} dollars each week for {c} weeks and then buys a {w.good} for {d} dollars. "
        f"How many dollars does {w.name} have left?"
    )
    return question, _solve(b, "*", c, "-", d)


def _compared(rng: random.Random) -> tuple[int, int, str, str]:
    """Two numbers, which of them is meant, in words and as an operator."""
    a, b = rng.sample(range(2, LARGEST + 1), 2)
    return a, b, *rng.choice([("more", "max"), ("fewer", "min")])


def _one_of_two(rng: random.Random, w: _Words) -> tuple[str, str]:
    a, b, word, operator = _compared(rng)
    c = _small(rng)
    sign = rng.choice("+-")
    question = (
        f"{w.name} has {a} {w.items} and {w.other} has {b}. The one with {word} "
        f"{_change(rng, w._replace(other=w.third), sign, c)}. How many {w.items} does this one have now?"
    )
    return question, _solve(a, operator, b, sign, c)


def _one_of_two_buys(rng: random.Random, w: _Words) -> tuple[str, str]:
    a, b, word, operator = _compared(rng)
    c = _small(rng)
    question = (
        f"{w.name} has {a} dollars and {w.other} has {b}. The one with {word} buys a {w.good} for {c} dollars. "
        "How many dollars does this one have left?"
    )
    return question, _solve(a, operator, b, "-", c)


def _one_of_two_places(rng: random.Random, _: _Words) -> tuple[str, str]:
    a, b, word, operator = _compared(rng)
    c = _small(rng)
    first, second = rng.sample(_PLACES, 2)
    place, preposition, leave, come = first
    other, where = second[:2]
    verb, sign = rng.choice([(leave, "-"), (come, "+")])
    question = (
        f"There are {a} people {preposition} a {place} and {b} {where} a {other}. {c} people {verb} where there are "
        f"{word}. How many people are there now?"
    )
    return question, _solve(a, operator, b, sign, c)


_ARITHMETIC: list[_Template] = [
    _two_changes,
    _two_changes,  # it has the most variety
    _together,
    _comparison,
    _boxes_and_loss,
    _boxes_and_rest,
    _shopping,
    _cost,
    _reading,
    _visitors,
    _times,
    _sharing,
    _ages,
    _saving,
]
PROBLEMS: dict[str, list[_Template]] = {
    "arithmetic": _ARITHMETIC,
    "comparisons": [_one_of_two, _one_of_two_buys, _one_of_two_places],
}
