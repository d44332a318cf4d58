"""HiTab from the files as they are downloaded: tables, prompts, one answer or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import prompt_and_response
from megatron_mdm.evaluation.tasks import hitab
from tests.evaluation.asked import questions
from tests.ranks import run_program_ranks

# As tables/raw/TABLE_ID.json has it; the text of a merged cell stands at its top left.
TABLE = {
    "title": "linkage rates, by sex",
    "top_root": {
        "row_index": -1,
        "column_index": -1,
        "children": [{"row_index": 0, "column_index": 1, "children": []}],
    },
    "left_root": {
        "row_index": -1,
        "column_index": -1,
        "children": [{"row_index": 2, "column_index": 0, "children": []}],
    },
    "top_header_rows_num": 2,
    "left_header_columns_num": 1,
    "texts": [
        ["sex", "rate", "", "n"],
        ["", "2011", "2016", ""],
        ["males", "88.0", "9|1", 7],
        ["females\n", "89.0", None, ""],
    ],
    "merged_regions": [
        {"first_row": 0, "last_row": 0, "first_column": 1, "last_column": 2},
        {"first_row": 0, "last_row": 1, "first_column": 0, "last_column": 0},
    ],
}
ROWS = "| sex | rate |  | n |\n|  | 2011 | 2016 |  |\n| males | 88.0 | 9\\|1 | 7 |\n| females | 89.0 |  |  |"
PROMPT = f"Table: linkage rates, by sex\n{ROWS}\nQuestion: which rates?\nPut the answer into \\boxed{{}}."
SAMPLE: dict[str, Any] = {
    "id": "0a",
    "table_id": "1099",
    "table_source": "statcan",
    "sub_sentence": "the rates were 88% and 89%",
    "question": "which rates?",
    "answer": [88.0, 89.0],
    "aggregation": ["none"],
    "linked_cells": {"quantity_link": {"[ANSWER]": {"(2, 1)": 88.0}}},
    "answer_formulas": ["=B5"],
    "reference_cells_map": {"B5": "(2, 1)"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tables" / "raw").mkdir(parents=True)
    (tmp_path / "tables" / "raw" / "1099.json").write_text(json.dumps(TABLE), encoding="utf-8")
    return tmp_path


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(folder: Path, *arguments: str) -> tuple[int, str]:
    paths = [str(folder / f"{name}_samples.jsonl") for name in ("train", "dev", "test")]
    command = ["task", "hitab", *paths, "--output", str(folder / "out"), *arguments]
    result = run_program_ranks("tools/prepare_data.py", command)[0]
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"table_content": TABLE},
        {"table_content": json.dumps(TABLE), "table_id": "elsewhere"},
        {"table_content": repr(TABLE), "answer": "[88.0, 89.0]", "table_id": "elsewhere"},  # as copies on the Hub
        {"title": TABLE["title"], "table": ROWS},
    ],
)
def test_training_and_scoring_ask_alike(changes: dict[str, Any], folder: Path) -> None:
    for name in ("train", "dev", "test"):
        write(folder / f"{name}_samples.jsonl", {**SAMPLE, **changes})
    assert prepare(folder) == (0, "")
    assert {path.name for path in (folder / "out").iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl"}
    path = folder / "out" / "test.jsonl"
    record = json.loads(path.read_text(encoding="utf-8"))
    (prompt,), response = prompt_and_response(record, DataConfig(train="", max_length=64))  # what training takes
    assert (prompt.content, response) == (PROMPT, "\\boxed{88, 89}")
    scored = [questions(str(file), "hitab") for file in (folder / "test_samples.jsonl", path)]
    assert scored == [[(PROMPT, "88, 89")]] * 2


def test_tables_in_another_folder(folder: Path) -> None:
    for name in ("train", "dev", "test"):
        write(folder / f"{name}_samples.jsonl", SAMPLE)
    (folder / "tables").rename(folder / "other")
    expected = folder / "tables" / "raw" / "1099.json"
    code, message = prepare(folder)
    assert (code, message.count("\n")) == (1, 1)
    assert f"train_samples.jsonl, line 1: no table {expected}; unpack" in message
    assert not (folder / "out").exists()
    assert prepare(folder, "--tables", str(folder / "other")) == (0, "")
    assert prepare(folder, "--tables", str(folder / "other" / "raw")) == (0, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": []}, "expected a list of answers"),
        ({"answer": None}, "expected a list of answers"),
        ({"answer": [None]}, "found None"),
        ({"answer": [True]}, "found True"),
        ({"answer": [""]}, "found ''"),
        ({"answer": [float("nan")]}, "found nan"),
        ({"answer": [[1.0]]}, r"found \[1.0\]"),
        ({"answer": "[1, x]"}, "'answer' is a text that is neither JSON nor a Python literal"),
        ({"question": None}, "a string in the field 'question'"),
        ({"table_id": "../raw/1099"}, "is no file's name"),
        ({"table_id": None}, "is no file's name"),
        ({"table_content": {"data": []}}, "an object with 'texts'"),
        ({"table_content": "nothing"}, "an object with 'texts'"),
        ({"table_content": "{" * 100_000}, "neither JSON nor a Python literal"),
        ({"table": "| a |"}, "'title'"),
    ],
)
def test_records_that_cannot_be_asked(changes: dict[str, Any], message: str, folder: Path) -> None:
    path = write(folder / "test.jsonl", SAMPLE, {**SAMPLE, **changes})
    with pytest.raises(UserError, match=f"line 2.*{message}"):
        questions(path, "hitab")


def test_broken_tables_are_named(folder: Path) -> None:
    path = write(folder / "test.jsonl", SAMPLE)
    for content, message in (("{", "cannot be read as JSON"), ('{"data": []}', "'texts'")):
        table = folder / "tables" / "raw" / f"{len(content)}.json"
        table.write_text(content, encoding="utf-8")
        write(folder / "test.jsonl", {**SAMPLE, "table_id": table.stem})
        with pytest.raises(UserError, match=f"{table.name}: .*{message}"):
            questions(path, "hitab")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is \boxed{8}", "8"),
        (r"\boxed{1} no, \boxed{2}.", "2"),
        (r"\boxed{ \text{Medical Park Antalyaspor} }", "medical park antalyaspor"),
        (r"\boxed{45\%}", "45"),
        (r"\boxed{\$1,234.}", "1234"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{2013/2014}", "2013/2014"),
        (r"\boxed{88.0, 89.0}", "88, 89"),
        (r"\boxed{88,89}", "88, 89"),
        (r"\boxed{88; 89}", "88, 89"),
        (r"\boxed{88 and 89}", "88, 89"),
        (r"\boxed{386,200, 90,400, and 42,400}", "386200, 90400, 42400"),
        (r"\boxed{1,000 and above, between 1 and 4}", "1,000 and above, between 1 and 4"),
        (r"\boxed{a", None),
        (r"\boxed{}", None),
        ("8", None),
    ],
)
def test_answers(text: str, answer: str | None) -> None:
    assert hitab.extract_answer(text) == answer


@pytest.mark.parametrize(
    ("predicted", "answers", "is_same"),
    [
        ("88.0, 89.0", [88, 89], True),
        ("88, 89", [88.0, 89.0], True),
        ("89 and 88", [88.0, 89.0], True),  # in any order
        ("88", [88, 89], False),
        ("88, 89, 90", [88, 89], False),
        ("88, 88", [88, 89], False),
        ("7", [7, 7], False),
        ("1,234", [1234.0], True),
        ("$1,234.00", [1234.0], True),
        ("−8", [-8.0], True),
        ("12 000", [12000], True),
        ("12 000", [12], False),
        ("45%", [45], True),
        ("0.45", [45], False),
        ("0.333333", [1 / 3], True),  # within 1e-5, as the official scorer has it
        ("0.3333", [1 / 3], False),
        (r"\frac{1}{3}", [1 / 3], True),
        ("1/3", [1 / 3], False),  # a year or a name as soon as a fraction
        ("2014/2015", ["2013/2014"], False),
        ("2013–14", ["2013-14"], True),
        ("Women", ["women"], True),
        ("women", ["men"], False),
        ("z, x,  y.", ["x", "y", "z"], True),
        (
            "construction, professional, scientific services",
            ["professional, scientific services", "construction"],
            True,
        ),
        ("eight", [8], False),
        ("8 apples", [8], False),
        ("5th", [5], False),
        ("fewer than 10", ["fewer than 100"], False),
    ],
)
def test_answers_compare_as_sets_of_numbers_and_texts(
    predicted: str, answers: list[Any], is_same: bool, folder: Path
) -> None:
    ((_, reference),) = questions(write(folder / "a.jsonl", {**SAMPLE, "answer": answers}), "hitab")
    answer = hitab.extract_answer(f"it is \\boxed{{{predicted}}}")
    assert answer is not None
    assert hitab.same(answer, reference) is is_same
