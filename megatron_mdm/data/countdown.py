"""Countdown: make the target of three numbers, each used once. Generated, with known solutions.

    Numbers 7 3 4, target 25:  →  3 * 7 = 21. 21 + 4 = 25. <answer>3 * 7 + 4</answer>

Every problem can be solved by steps whose values are whole numbers from 1 to 99; fractions and negative numbers may
solve it, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement
from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.puzzles import SPLITS, Puzzle, check_sizes, record_of

LARGEST = 24  # of the given numbers, unless a caller says another
OPERATORS = "+-*/"
LARGEST_VALUE = 99  # of targets and steps
# Of the sets of three numbers: no set is in two splits, so that none is known from another target
_SHARES = {"train": 0.8, "validation": 0.05, "test": 0.15}

Numbers = tuple[int, int, int]


class Solution(NamedTuple):
    steps: str
    expression: str


def generate(
    sizes: Mapping[str, int], seed: int, style: str = "short", operators: str = OPERATORS, largest: int = LARGEST
) -> dict[str, list[Record]]:
    """Problems by split, no two alike, with numbers from 1 to largest and a solution that needs no operators but these.
    A pure function of its arguments. Raises UserError for sizes there is no room for, operators and numbers that there
    are not."""
    _check(operators, largest)
    rng = random.Random(seed)
    sets = list(combinations_with_replacement(range(1, largest + 1), 3))
    rng.shuffle(sets)
    splits: dict[str, list[tuple[Numbers, int, list[Solution]]]] = {}
    first = 0
    for name in SPLITS:
        end = first + round(_SHARES[name] * len(sets)) if name != SPLITS[-1] else len(sets)
        solved = ((numbers, _problems(numbers, operators)) for numbers in sets[first:end])
        splits[name] = [(numbers, *problem) for numbers, problems in solved for problem in problems.items()]
        rng.shuffle(splits[name])
        first = end
    check_sizes(sizes, {name: len(problems) for name, problems in splits.items()}, "problems")
    return {name: [_record(rng, *problem, style) for problem in splits[name][:size]] for name, size in sizes.items()}


def _check(operators: str, largest: int) -> None:
    if not operators or not set(operators) <= set(OPERATORS):
        raise UserError(f"--operators {operators!r}: give one or more of {OPERATORS}, as in --operators=+-")
    if not 3 <= largest <= LARGEST_VALUE:
        raise UserError(f"--largest {largest}: give the largest number of a problem, 3 to {LARGEST_VALUE}")


def _record(rng: random.Random, numbers: Numbers, target: int, solutions: list[Solution], style: str) -> Record:
    shown = rng.sample(numbers, len(numbers))
    steps, expression = rng.choice(solutions)
    puzzle = Puzzle(
        short=f"Numbers {' '.join(map(str, shown))}, target {target}:",
        long=(
            f"Using only the numbers {shown}, write an arithmetic expression whose value is exactly {target}. Use "
            "every number exactly once, and no other number, with +, -, *, / and parentheses. Put the expression, "
            "without an equals sign, into <answer></answer>."
        ),
        steps=steps,
        answer=expression,
        columns={"numbers": shown, "target": target},
    )
    return record_of(puzzle, style)


def _problems(numbers: Numbers, operators: str) -> dict[int, list[Solution]]:
    """Every target that the numbers can make by these operators, with the solutions."""
    found: dict[int, dict[Solution, None]] = {}
    for place in range(3):
        last = numbers[place]
        first, second = sorted(numbers[:place] + numbers[place + 1 :], reverse=True)
        for middle, operator in _values(first, second, operators):
            step = f"{first} {operator} {second}"
            for target, solution in _second(middle, operator, step, last, operators):
                found.setdefault(target, {})[solution] = None
    return {target: list(solutions) for target, solutions in sorted(found.items())}


def _second(middle: int, operator: str, step: str, last: int, operators: str) -> Iterator[tuple[int, Solution]]:
    """Targets of a first step's value and the number that is left."""
    is_sum = operator in "+-"
    for target, then in _values(max(middle, last), min(middle, last), operators):
        is_first = middle >= last
        needs = (is_sum and then in "*/") or (not is_first and then in "-/")
        inner = f"({step})" if needs else step
        expression = f"{inner} {then} {last}" if is_first else f"{last} {then} {inner}"
        pair = f"{middle} {then} {last}" if is_first else f"{last} {then} {middle}"
        yield target, Solution(f"{step} = {middle}. {pair} = {target}.", expression)


def _values(larger: int, smaller: int, operators: str) -> Iterator[tuple[int, str]]:
    """What two numbers make by these operators, as (value, operator); the larger stands first."""
    candidates = [(larger + smaller, "+"), (larger - smaller, "-"), (larger * smaller, "*")]
    if larger % smaller == 0:
        candidates.append((larger // smaller, "/"))
    for value, operator in candidates:
        if operator in operators and 1 <= value <= LARGEST_VALUE:
            yield value, operator
