"""Generated puzzles: solved, solvable in one way, and split without a leak."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig, RlConfig
from megatron_mdm.data import countdown, sudoku
from megatron_mdm.data.columns import conversation
from megatron_mdm.evaluation.tasks.expressions import value_of
from megatron_mdm.rl.rewards import Rewards, check_records, columns_of
from tests.ranks import run_program_ranks

SIZES = {"train": 3000, "validation": 100, "test": 500}


@pytest.fixture(scope="module")
def problems() -> dict[str, list[dict[str, Any]]]:
    return countdown.generate(SIZES, seed=0)


@pytest.fixture(scope="module")
def grids() -> dict[str, list[dict[str, Any]]]:
    return sudoku.generate({"train": 600, "validation": 60, "test": 116}, seed=0)


def rewards(name: str, records: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    rl = RlConfig.model_validate({"rewards": [{"name": name}]})
    functions = Rewards.of(rl)
    check_records(rl, records)
    prompts, responses = ([record[key] for record in records] for key in ("prompt", "response"))
    return functions(prompts, responses, columns_of(records))[:, 0]


def test_every_countdown_is_solved_by_its_response(problems: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(split) for name, split in problems.items()} == SIZES
    for split in problems.values():
        assert (rewards("countdown", split) == 1.0).all()
        for record in split:
            assert max(record["numbers"]) <= 24
            assert 1 <= record["target"] <= 99
            assert len(record["numbers"]) == 3
            *steps, _ = record["response"].split(". ")
            for step in steps:
                expression, value = step.split(" = ")
                assert value_of(expression) == int(value)
    first = problems["train"][0]
    assert first["prompt"] == f"Numbers {' '.join(map(str, first['numbers']))}, target {first['target']}:"


def test_no_three_numbers_are_in_two_splits(problems: dict[str, list[dict[str, Any]]]) -> None:
    sets = {name: {tuple(sorted(record["numbers"])) for record in split} for name, split in problems.items()}
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    questions = [(*sorted(record["numbers"]), record["target"]) for split in problems.values() for record in split]
    assert len(set(questions)) == len(questions)


def test_countdown_depends_on_the_seed_alone(problems: dict[str, list[dict[str, Any]]]) -> None:
    assert countdown.generate(SIZES, seed=0) == problems
    with pytest.raises(UserError, match=r"--train 50,000: there are 1\d,\d{3} problems for it"):
        countdown.generate({**SIZES, "train": 50_000}, seed=0)


def test_countdown_with_fewer_operators_and_larger_numbers() -> None:
    problems = countdown.generate(SIZES, seed=0, operators="+-", largest=32)
    for split in problems.values():
        assert (rewards("countdown", split) == 1.0).all()
        assert not any(
            set(record["response"].partition("<answer>")[2].removesuffix("</answer>")) & set("*/") for record in split
        )
    assert max(max(record["numbers"]) for record in problems["train"]) == 32


def test_countdown_refuses_operators_and_numbers_it_does_not_have() -> None:
    with pytest.raises(UserError, match=r"--operators '\+\^': give one or more of"):
        countdown.generate(SIZES, seed=0, operators="+^")
    with pytest.raises(UserError, match=r"--largest 100: give the largest number of a problem, 3 to 99"):
        countdown.generate(SIZES, seed=0, largest=100)


def solutions(puzzle: str) -> list[str]:
    """Every way to fill a grid, by trying."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    row, column = divmod(cell, 4)
    box = [4 * (row - row % 2 + r) + column - column % 2 + c for r, c in product(range(2), repeat=2)]
    seen = {puzzle[other] for other in (*range(4 * row, 4 * row + 4), *range(column, 16, 4), *box)}
    digits = [digit for digit in "1234" if digit not in seen]
    return [solved for digit in digits for solved in solutions(puzzle[:cell] + digit + puzzle[cell + 1 :])]


def test_every_sudoku_has_the_one_solution_that_its_response_gives(grids: dict[str, list[dict[str, Any]]]) -> None:
    assert len(sudoku.grids()) == len({grid.tobytes() for grid in sudoku.grids()}) == len(solutions("0" * 16)) == 288
    for split in grids.values():
        assert (rewards("sudoku4_exact", split) == 1.0).all()
        assert (rewards("sudoku4", split) == 1.0).all()
    for record in grids["test"]:
        assert solutions(record["puzzle"]) == [record["solution"]]
        assert 4 <= record["puzzle"].count("0") <= 10


def test_no_solved_grid_is_in_two_splits(grids: dict[str, list[dict[str, Any]]]) -> None:
    found = {name: {record["solution"] for record in split} for name, split in grids.items()}
    assert {name: len(split) for name, split in found.items()} == {"train": 200, "validation": 30, "test": 58}
    assert len(set.union(*found.values())) == 288
    puzzles = [record["puzzle"] for split in grids.values() for record in split]
    assert len(set(puzzles)) == len(puzzles)


def test_puzzles_are_written_for_training_and_for_rewards(tmp_path: Path) -> None:
    sizes = ["--train", "5", "--validation", "3", "--test", "4", "--style", "tags"]
    result = run_program_ranks("tools/prepare_data.py", ["sudoku", "--output", str(tmp_path), *sizes])[0]
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert (rewards("sudoku4", records) == 1.0).all()
    turns = conversation(records[0], DataConfig(train="x", max_length=8))
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[1].content.startswith("<reasoning>\n")
    result = run_program_ranks("tools/prepare_data.py", ["countdown", "--output", str(tmp_path), "--test", "0"])[0]
    assert result.exit_code == 1
    assert re.search(r"error: --test 0: there are \d,\d{3} problems for it; ask for 1 to", result.stderr)
