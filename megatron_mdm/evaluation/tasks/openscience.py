"""OpenScience: multiple-choice questions whose reasoning ends in the letter of an option, `\\boxed{B}`."""

import argparse
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.public_sets import Sets, check_number, field, nine_to_one
from megatron_mdm.data.records import Record, read_records
from megatron_mdm.evaluation.tasks.markup import boxed_content, plain

# rows 1–5000, of which a tenth for validation; rows 5001–6000
NUM_TRAIN = 5000
NUM_TEST = 1000

_LETTER = r"(?:\([A-J]\)|[A-J](?![A-Za-z0-9]))"
_LETTERS = rf"{_LETTER}(?:(?: ?[,;&/] ?| and |, and ){_LETTER})*"
_OPTION = re.compile(rf"({_LETTERS})\.?|(\([A-J]\)) .*|([A-J])[.):] .*", re.DOTALL)
_SAID = re.compile(r"(?i:\banswer(?: is)?)\s*:?\s+")
_SAID_OPTION = re.compile(rf"({_LETTERS})(?=\s*(?:[.:!?)\n]|$)|,? (?:because|since|as)\b)")


def prepare(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """The first 5,000 rows, 9 : 1 for training and validation, and rows 5,001 to 6,000 for the test."""
    check_number(paths, (1,), "openscience", "one file, or one name for `datasets`")
    rows = []
    for where, record in islice(read_records(paths[0]), NUM_TRAIN + NUM_TEST):
        prompt, response = _texts(record, where)
        rows.append({"prompt": prompt, "response": response})
    if len(rows) <= NUM_TRAIN:
        raise UserError(f"{paths[0]}: {len(rows):,} rows, but the test set begins with row {NUM_TRAIN + 1:,}")
    return {**nine_to_one(rows[:NUM_TRAIN], arguments.seed), "test": rows[NUM_TRAIN:]}


def question(record: Record, where: str, folder: Path) -> tuple[str, str] | None:
    """(input, output) of a record of the data set."""
    return _texts(record, where) if {"input", "output"} <= record.keys() else None


def extract_answer(response: str) -> str | None:
    """The option in the last \\boxed{…}; without one, that of the last "answer is B" or "Answer: B".

    In a box stand a letter, or several, or a letter and its option's text ("D. Mitosis"): "A dog" and "A1" are no
    letters. Several come back in order, "B, D".
    """
    content = boxed_content(response)
    if content is not None:
        match = _OPTION.fullmatch(_bare(content))
        return _in_order(next(filter(None, match.groups()))) if match else None
    text = _bare(response)
    places = [place.end() for place in _SAID.finditer(text)]
    said = _SAID_OPTION.match(text, places[-1]) if places else None
    return _in_order(said[1]) if said else None


def reference_answer(response: str) -> str:
    answer = extract_answer(response)
    if answer is None:
        raise ValueError(f"expected the letter of an option in \\boxed{{…}}; found {boxed_content(response)!r} there")
    return answer


def _texts(record: Record, where: str) -> tuple[str, str]:
    return field(record, ("input", "prompt"), where), field(record, ("output", "response"), where)


def _bare(text: str) -> str:
    return re.sub(r"[*`$]", "", plain(text)).strip()


def _in_order(letters: str) -> str:
    return ", ".join(sorted(set(re.findall("[A-J]", letters))))
