"""`mdm prepare countdown` and `mdm prepare sudoku`: generated puzzles for reinforcement learning."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data import countdown, sudoku
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.puzzles import SPLITS, STYLES

SIZES = {"train": 15_000, "validation": 500, "test": 2_000}


def write_countdown(arguments: argparse.Namespace) -> None:
    _write(arguments, partial(countdown.generate, operators=arguments.operators, largest=arguments.largest))


def write_sudoku(arguments: argparse.Namespace) -> None:
    _write(arguments, sudoku.generate)


def _write(arguments: argparse.Namespace, generate: Callable[..., dict[str, list[Record]]]) -> None:
    """train.jsonl, validation.jsonl and test.jsonl: prompts with solved responses and what rewards are judged by."""
    sizes = {name: getattr(arguments, name) for name in SPLITS}
    try:
        for name, records in generate(sizes, arguments.seed, arguments.style).items():
            path = arguments.output / f"{name}.jsonl"
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
            print(f"{path}: {len(records):,} puzzles")
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output}: cannot be written ({error.strerror})") from None


def add_countdown(command: argparse.ArgumentParser) -> None:
    _add(command)
    command.add_argument(
        "--operators", default=countdown.OPERATORS, help="that a solution needs: --operators=+- for an easier task"
    )
    command.add_argument("--largest", type=int, default=countdown.LARGEST, help="of the given numbers")
    command.set_defaults(run=write_countdown)


def add_sudoku(command: argparse.ArgumentParser) -> None:
    _add(command)
    command.set_defaults(run=write_sudoku)


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True)
    for name, size in SIZES.items():
        command.add_argument(f"--{name}", type=int, default=size)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--style", choices=STYLES, default="short", help="tags: instructions and tags for a pretrained model, as d1's"
    )
