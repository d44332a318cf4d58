"""What generated puzzles have in common: the two ways in which they are asked, and splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.answer_tags import CLOSING, FORM, OPENING
from megatron_mdm.data.json_files import Record

SPLITS = ("train", "validation", "test")


class Puzzle(NamedTuple):
    short: str  # the question for a model that knows nothing else
    long: str  # for one that was trained on instructions
    steps: str  # towards the answer; may be empty
    answer: str
    columns: Mapping[str, object]  # what rewards are judged by


def record_of(puzzle: Puzzle, style: str) -> Record:
    """A prompt with its solved response, for fine-tuning and for reinforcement learning alike. style: of STYLES."""
    prompt, response = STYLES[style](puzzle)
    return {"prompt": prompt, "response": response, **puzzle.columns}


def _short(puzzle: Puzzle) -> tuple[str, str]:
    steps = f"{puzzle.steps} " if puzzle.steps else ""
    return puzzle.short, f"{steps}{OPENING}{puzzle.answer}{CLOSING}"


def _tags(puzzle: Puzzle) -> tuple[str, str]:
    """d1's form: reasoning and answer between tags."""
    response = f"<reasoning>\n{puzzle.steps}\n</reasoning>\n{OPENING}\n{puzzle.answer}\n{CLOSING}\n"
    return f"{FORM}{puzzle.long}", response


STYLES = {"short": _short, "tags": _tags}


def check_sizes(sizes: Mapping[str, int], most: Mapping[str, int], what: str) -> None:
    """Raise UserError where a split is empty or larger than there are puzzles for it."""
    for name, size in sizes.items():
        if not 1 <= size <= most[name]:
            raise UserError(f"--{name} {size:,}: there are {most[name]:,} {what} for it; ask for 1 to {most[name]:,}")
