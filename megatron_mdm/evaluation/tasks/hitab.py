"""HiTab: questions about hierarchical tables, answered in `\\boxed{…}` by numbers or texts, one or several.

The official scorer (qa/table/utils.py in microsoft/HiTab) compares lists in their order, numbers within 1e-5 and
without a percent sign or parentheses, texts without diacritics, citations and parentheses at their end. Here, too,
numbers are compared within 1e-5 and without a percent sign; but also without a currency, "(5)" is no number, texts keep
what they say, and the order of a list does not matter.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.public_sets import Sets, check_number, field
from megatron_mdm.data.records import Record, read_records
from megatron_mdm.evaluation.tasks.hitab_tables import literal, table_of
from megatron_mdm.evaluation.tasks.markup import boxed_content, plain
from megatron_mdm.evaluation.tasks.numbers import parse_number, written

TOLERANCE = Fraction(1, 100_000)

# Between the answers of a list: not the comma of "1,234".
_BETWEEN = re.compile(r"[;\n]|(?<![0-9]),|,(?![0-9]{3}(?![0-9]))")
_AND = re.compile(r"(?:^|(?<!\s)\s+)(?:and|&)\s+")


def prepare(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """The official splits, train, dev and test, from the files as they are downloaded."""
    check_number(paths, (2, 3), "hitab", "the files of train, (dev) and test")
    names = ("train", "test") if len(paths) == 2 else ("train", "validation", "test")
    return {name: list(_samples(path, arguments.tables)) for name, path in zip(names, paths)}


def question(record: Record, where: str, folder: Path) -> tuple[str, str] | None:
    """(prompt, reference response) of a record of the data set, whose tables are in tables/ beside its file."""
    if not {"table", "table_content", "table_id"} & record.keys() or {"prompt", "response"} <= record.keys():
        return None
    return _prompt(record, where, folder / "tables"), _response(_answers(record, where))


def extract_answer(response: str) -> str | None:
    """The answers in the last \\boxed{…}, numbers in their one way of writing, texts cleaned and in lower case."""
    content = boxed_content(response)
    if content is None:
        return None
    return ", ".join(map(_text_of, _parts(content))) or None


def reference_answer(response: str) -> str:
    answer = extract_answer(response)
    if answer is None:
        raise ValueError(f"expected an answer in \\boxed{{…}}; found {boxed_content(response)!r} there")
    return answer


def same(predicted: str, answer: str) -> bool:
    """Whether the answers are equal as multisets of numbers and texts."""
    (numbers, texts), (wanted_numbers, wanted_texts) = map(_sorted, (predicted, answer))
    return (
        texts == wanted_texts
        and len(numbers) == len(wanted_numbers)
        and all(abs(number - wanted) < TOLERANCE for number, wanted in zip(numbers, wanted_numbers))
    )


def _samples(path: str, tables: str) -> Iterator[Record]:
    folder = Path(tables) if tables else Path(path).parent / "tables"
    for where, record in read_records(path):
        answers = _answers(record, where)
        prompt = _prompt(record, where, folder)
        yield {"prompt": prompt, "response": _response(answers), "answer": ", ".join(answers)}


def _prompt(record: Record, where: str, tables: Path) -> str:
    title, table = table_of(record, where, tables)
    text = field(record, ("question",), where)
    return f"Table: {title}\n{table}\nQuestion: {text}\nPut the answer into \\boxed{{}}."


def _response(answers: Sequence[str]) -> str:
    return f"\\boxed{{{', '.join(answers)}}}"


def _answers(record: Record, where: str) -> list[str]:
    """The record's answers as texts: 29.0 is 29. Copies of the data set hold the list as text."""
    answers = literal(record.get("answer"), where, "answer")
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: expected a list of answers in the field 'answer'")
    return [_answer_text(answer, where) for answer in answers]


def _answer_text(answer: Any, where: str) -> str:
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return written(Fraction(repr(answer)))
    raise UserError(f"{where}: expected numbers and texts in 'answer'; found {answer!r}")


def _parts(content: str) -> Iterator[Fraction | str]:
    """The answers of a list: numbers, and cleaned texts."""
    for part in _BETWEEN.split(plain(content)):
        numbers = [parse_number(text) for text in _AND.split(part) if text.strip()]
        if None not in numbers:
            yield from numbers  # type: ignore[misc]
        elif text := _cleaned(part):
            yield text


def _cleaned(text: str) -> str:
    """The text by the published rules (strip, drop backslashes and a trailing period), in lower case, with single
    spaces, without emphasis and quotes around it."""
    return " ".join(text.replace("\\", "").strip(' *"`').removesuffix(".").lower().split())


def _text_of(part: Fraction | str) -> str:
    """An answer as text; a fraction keeps its own bar, so that it is read back as one."""
    return part if isinstance(part, str) else written(part).replace("/", "\u2044")


def _sorted(answer: str) -> tuple[list[Fraction], Counter[str]]:
    parts = list(_parts(answer))
    return sorted(part for part in parts if isinstance(part, Fraction)), Counter(
        part for part in parts if isinstance(part, str)
    )
