"""`mdm prepare countdown` and `mdm prepare sudoku`: generated puzzles for reinforcement learning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data import countdown, sudoku
from megatron_mdm.data.puzzles import SPLITS, STYLES

PUZZLES = {"countdown": countdown.generate, "sudoku": sudoku.generate}
COUNTDOWN = ("operators", "largest")  # options of countdown alone
SIZES = {"train": 15_000, "validation": 500, "test": 2_000}


def write_puzzles(arguments: argparse.Namespace) -> None:
    """train.jsonl, validation.jsonl and test.jsonl: prompts with solved responses and what rewards are judged by."""
    sizes = {name: getattr(arguments, name) for name in SPLITS}
    further = {name: getattr(arguments, name) for name in COUNTDOWN if hasattr(arguments, name)}
    try:
        for name, records in PUZZLES[arguments.command](sizes, arguments.seed, arguments.style, **further).items():
            path = arguments.output / f"{name}.jsonl"
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
            print(f"{path}: {len(records):,} puzzles")
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output}: cannot be written ({error.strerror})") from None


def add_countdown(command: argparse.ArgumentParser) -> None:
    add_puzzles(command)
    command.add_argument(
        "--operators", default=countdown.OPERATORS, help="that a solution needs: --operators=+- for an easier task"
    )
    command.add_argument("--largest", type=int, default=countdown.LARGEST, help="of the given numbers")


def add_puzzles(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True)
    for name, size in SIZES.items():
        command.add_argument(f"--{name}", type=int, default=size)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--style", choices=STYLES, default="short", help="tags: instructions and tags for a pretrained model, as d1's"
    )
    command.set_defaults(run=write_puzzles)
