"""GSM8K: a chain of thought that ends in `#### number`.

The answer is what stands on the line behind the last `####` that has anything behind it: a number (numbers.py), and
behind it at most words. "18 apples" and "18. The end" are 18, as in OpenAI's scorer and lm-eval's strict match. Unlike
theirs, a line that continues with what could change the number (digits, an operator, "and a half") is no answer.

gsm8k_tags asks the same questions for an answer between tags (data/answer_tags.py), as d1 does: the number, and nothing
else, in the last <answer>…</answer>.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.answer_tags import FORM, tagged_answer
from megatron_mdm.data.public_sets import Sets, check_number, field
from megatron_mdm.data.records import Record, read_records
from megatron_mdm.evaluation.tasks.markup import plain
from megatron_mdm.evaluation.tasks.numbers import leading_number, parse_number, written

_MARK = re.compile("#{4,}")
_BEHIND_A_NUMBER = re.compile(r"(?:[.,;:?°].*|/[A-Za-z].*|\s.*)?")
_CHANGES_IT = re.compile(
    r"[+=^×÷±<>≈\\]|^\s[-*/]\s|\b(?:half|halves|and an? (?:third|quarter|fourth)|plus|minus|squared|cubed|k|bn|mn)\b"
)
_POWER_OF_A_UNIT = re.compile(r"\b(mm|cm|m|km|in|ft|yd|mi)(?:\^?[23]|[²³])(?![0-9])")


def prepare(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """The official files, train and test, as they are."""
    check_number(paths, (2,), "gsm8k", "two files, train and test")
    return {name: _questions(path) for name, path in zip(("train", "test"), paths)}


def prepare_tagged(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """The same with prompts that ask for tags; responses stay as they are."""
    return {
        name: [{"prompt": f"{FORM}{row['question']}", "response": row["answer"]} for row in rows]
        for name, rows in prepare(paths, arguments).items()
    }


def tagged_question(record: Record, where: str, folder: Path) -> tuple[str, str] | None:
    """(prompt, reference response) of an official record."""
    if not {"question", "answer"} <= record.keys():
        return None
    return FORM + field(record, ("question",), where), field(record, ("answer",), where)


def extract_tagged(response: str) -> str | None:
    """The number between the tags in its one way of writing; None where there is none, or more than a number."""
    answer = tagged_answer(response)
    value = parse_number(answer, slash=True) if answer else None
    return None if value is None else written(value)


def extract_answer(response: str) -> str | None:
    """The number of a response in its one way of writing; None where it has none."""
    found = leading_number(_answer_line(response), slash=True)
    if found is None:
        return None
    value = found[0]
    rest = _POWER_OF_A_UNIT.sub(r"\1", found[1])
    is_words = _BEHIND_A_NUMBER.fullmatch(rest) and not any(map(str.isnumeric, rest)) and not _CHANGES_IT.search(rest)
    return written(value) if is_words else None


def reference_answer(answer: str) -> str:
    """The number of a reference, which must be a number and nothing else. Raises ValueError."""
    line = _answer_line(answer)
    value = parse_number(line, slash=True)
    if value is None:
        raise ValueError(f"expected #### and a number at the answer's end; found {line!r} behind ####")
    return written(value)


def _answer_line(response: str) -> str:
    parts = [part for part in map(plain, _MARK.split(response)[1:]) if part.strip()]
    return parts[-1].strip().split("\n")[0].strip() if parts else ""


def _questions(path: str) -> list[Record]:
    rows = []
    for where, record in read_records(path):
        question, answer = (field(record, (name,), where) for name in ("question", "answer"))
        try:
            reference_answer(answer)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        rows.append({"question": question, "answer": answer})
    return rows
