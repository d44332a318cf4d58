"""Prepare data files.

python tools/prepare_data.py arithmetic --output FOLDER [--train 60000 --validation 500 --test 500 --seed 0]
    generates word problems in GSM8K's format: train.jsonl, validation.jsonl and test.jsonl, no question twice
"""

import argparse
import json
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.word_problems import generate
from megatron_mdm.parallel.program import run_program

MOST_PROBLEMS = 1_000_000  # far below the number of distinct questions, so that generation ends


def arithmetic(arguments: argparse.Namespace) -> None:
    sizes = {"test": arguments.test, "validation": arguments.validation, "train": arguments.train}
    if min(sizes.values()) < 1 or sum(sizes.values()) > MOST_PROBLEMS:
        raise UserError(f"sizes must be positive and at most {MOST_PROBLEMS:,} together")
    seen: set[str] = set()
    for index, (name, size) in enumerate(sizes.items()):  # held-out sets first: they do not depend on the others' sizes
        problems = generate(size, arguments.seed * len(sizes) + index, seen)
        seen.update(problem["question"] for problem in problems)
        path = arguments.output / f"{name}.jsonl"
        write_atomically(path, "".join(json.dumps(problem) + "\n" for problem in problems))
        print(f"{path}: {size:,} problems")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("arithmetic", help="generated word problems in GSM8K's format")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--train", type=int, default=60_000)
    command.add_argument("--validation", type=int, default=500)
    command.add_argument("--test", type=int, default=500)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=arithmetic)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    run_program(main)
