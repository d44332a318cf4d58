"""Final answers: the whole number or nothing, compared as numbers; what is no answer; what is no reference."""

from __future__ import annotations

import argparse
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.data import countdown, sudoku
from megatron_mdm.evaluation.tasks import TASKS, gsm8k, openscience
from megatron_mdm.evaluation.tasks.numbers import parse_number, written
from tests.evaluation.asked import questions

# fmt: off
WAYS_TO_WRITE = {
    "18": (
        "18", "18.", "18.0", "18.00", "018", "+18", "$18", "18$", "€18", "18 €", "£18", "US$18", "USD 18", "18%",
        "18 %", "**18**", "***18***", "*18*", "__18__", "`18`", '"18"', "$18$", "$$18$$", r"\$18", r"\(18\)",
        r"\[18\]", r"\boxed{18}", r"$\boxed{18}$", r"**\boxed{\$18}**", r"\text{18}", r"\mathbf{18}", r"18\%",
        "<answer>18</answer>", "<b>18</b>", "１８", "1.8e1", "36/2", r"\frac{36}{2}", "**$18**", "**18.**", "$**18**",
    ),
    "1000": (
        "1000", "1,000", "1,000.00", "$1,000.00", "1 000", "1\u00a0000", "1\u202f000", "1\u2009000", "1'000",
        r"1{,}000", r"1\,000", r"1\;000", "1e3", "1E+3", "10.0e2", "1 thousand",
    ),
    "1234567.5": ("1,234,567.5", "1 234 567.5", "1234567.50", "2469135/2", "1.2345675e6", "1.2345675 million"),
    "-5": ("-5", "−5", "–5", "-5.0", "-$5", "$-5", "−$5", "-5/1", r"\boxed{-5}", r"-\frac{10}{2}"),
    "0": ("0", "-0", "+0", "0.0", "-0.00", "0/7", "000", "0%"),
    "0.5": (".5", "0.5", "0.50", "1/2", "1 / 2", "2/4", "½", r"\frac{1}{2}", r"\dfrac12", "5e-1", "+.5"),
    "3.5": ("3.5", "3 1/2", "3½", "3 ½", r"3\frac{1}{2}", r"3 \tfrac{1}{2}", "7/2"),
    "1/3": ("1/3", "2/6", "⅓", r"\frac{1}{3}", r"\boxed{\frac{1}{3}}", "1⁄3"),
    "-2/3": ("-2/3", "−2/3", r"-\frac{2}{3}", "-⅔"),
    "7": ("7", "007", "7.000", "14/2"),
}
NO_NUMBERS = [
    "", " ", "seven", "####", "-", "$", ".", "%", "1,2,3", "1,2", "12,34", "1,00,000", "1,0000", "0,500", "1,000,00",
    "1.2.3", "1.000,50", "3,5", "1 2", "12 00", "12 0000", "1 234,567", "1,234 567", "--5", "+-5", "±5", "~5", "≈5",
    "1/0", "1/", "/2", "1/2/3", "1/2/2020", "3 5/2", "1 200/3", "1.5/2", "5^2", "5²", "5_2", "5x", "5k", "5kg", "5th",
    "x5", "#5", "5-3", "5+3", "5*3", "2×3", "5:30", "5e", "e5", "1e3.5", "1e9999999", "0x10", "1_000", "(5)", "5!",
    "√4", r"\sqrt{16}", r"\frac{1}{x}", r"10^{2}", r"\boxed{5", "inf", "nan", "9" * 5000, "9" * 301, "٥",
]
# fmt: on


@pytest.mark.parametrize("value", WAYS_TO_WRITE)
def test_a_number_is_the_same_however_it_is_written(value: str) -> None:
    for text in WAYS_TO_WRITE[value]:
        assert gsm8k.extract_answer(f"so it is\n#### {text}") == value, text
        assert gsm8k.reference_answer(f"so it is\n#### {text}") == value, text


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_a_number_is_read_as_a_whole_or_not_at_all(text: str) -> None:
    assert gsm8k.extract_answer(f"#### {text}") is None
    assert parse_number(text) is None
    with pytest.raises(ValueError, match="expected #### and a number"):
        gsm8k.reference_answer(f"#### {text}")


def test_numbers_are_exact() -> None:
    """Every number is written in one way, and read back from it."""
    generator = random.Random(0)
    for _ in range(2000):
        value = Fraction(generator.randint(-(10**6), 10**6), generator.choice([1, 2, 3, 5, 7, 8, 25, 10**4, 10**9]))
        text = written(value)
        assert parse_number(text, slash=True) == value
        if "/" not in text:
            assert Fraction(text) == value
    assert written(Fraction(1, 3)) != written(Fraction("0.333333333333333333"))


def test_years_are_no_fractions_unless_asked() -> None:
    assert parse_number("2013/2014") is None
    assert parse_number("2013/2014", slash=True) == Fraction(2013, 2014)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7. #### 7", "7"),
        ("first #### 1 then #### 2", "2"),  # the last one
        ("#### 18\n#### 20", "20"),
        ("#### 18\n####", "18"),  # a mark with nothing behind it
        ("#### 18 ####", "18"),
        ("#### 18\n#### none", None),
        ("####\n18", "18"),
        ("####18", "18"),
        ("###### 18", "18"),
        ("#### 18\nThe answer is 20.", "18"),  # the line ends the answer
        ("#### 18 apples", "18"),
        ("#### 18.", "18"),
        ("#### 18. The answer is right.", "18"),
        ("#### 18, of course", "18"),
        ("#### $18/hour", "18"),
        ("#### 18 km/h", "18"),
        ("#### 18 m²", "18"),
        ("#### 18 cm^2", "18"),
        ("#### 18 apples - that is all", "18"),
        ("#### 18°", "18"),
        ("#### 20 percent", "20"),
        ("#### **18** apples", "18"),
        (r"#### 18\text{ apples}", "18"),
        (r"#### 18 \\ done", "18"),
        ("#### 5 quarters", "5"),
        ("#### 2 million", "2000000"),
        ("#### $1.5 million dollars", "1500000"),
        ("#### 2 dozen eggs", "24"),
        # What could change the number is not left out.
        ("#### 18 of 20", None),
        ("#### 18 or 20", None),
        ("#### 18 20", None),
        ("#### 18, 20", None),
        ("#### 18 feet 6 inches", None),
        ("#### 5 and a half", None),
        ("#### 5 half", None),
        ("#### 18 + x", None),
        ("#### 18 - x", None),
        ("#### 18 x²", None),
        ("#### 18 x^2", None),
        ("#### 18 = x", None),
        (r"#### 18 \times x", None),
        ("#### 18 squared", None),
        ("#### 5 k", None),
        ("#### 18 (6 + 12)", None),
        ("#### The answer is 18", None),
        ("#### x = 18", None),
        ("seven", None),
        ("18", None),
    ],
)
def test_gsm8k_answers(text: str, answer: str | None) -> None:
    assert gsm8k.extract_answer(text) == answer


def test_answers_of_other_values_differ() -> None:
    same = TASKS["gsm8k"].same
    for reference, others in (
        ("#### 1/2", ("#### 1/3", "#### 1", "#### 2", "#### 1/20")),
        ("#### 12000", ("#### 12", "#### 12 00", "#### 1200")),
        ("#### 1500", ("#### 1.5", "#### 1.5e2", "#### 1,5")),
    ):
        answer = gsm8k.reference_answer(reference)
        for other in others:
            predicted = gsm8k.extract_answer(other)
            assert predicted is None or not same(predicted, answer), (reference, other)


@pytest.mark.parametrize("answer", ["18 apples", "18 of 20", "1,2,3", "18 (or 20)", "eighteen", "", "18 + 2"])
def test_a_reference_that_is_a_number_only_in_part_is_refused(answer: str, tmp_path: Path) -> None:
    rows = [{"question": "a?", "answer": "#### 1"}, {"question": "b?", "answer": f"#### {answer}"}]
    with pytest.raises(UserError, match=r"test.jsonl, line 2: .*number") as error:
        questions(write(tmp_path / "test.jsonl", rows), "gsm8k")
    assert repr(answer) in str(error.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Thus \boxed{B}", "B"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{**C**}", "C"),
        (r"$\boxed{\mathbf{C}}$", "C"),
        (r"\boxed {C}", "C"),
        (r"\boxed{D. Mitosis}", "D"),
        (r"\boxed{D: Mitosis}", "D"),
        (r"\boxed{(A)}", "A"),
        (r"\boxed{(A) a dog}", "A"),
        (r"\boxed{A) a dog}", "A"),
        (r"\boxed{B, D}", "B, D"),
        (r"\boxed{D and B}", "B, D"),
        (r"\boxed{(B), (D)}", "B, D"),
        (r"\boxed{B or D}", None),
        (r"\boxed{Because}", None),
        (r"\boxed{A dog}", None),
        (r"\boxed{A1}", None),
        (r"\boxed{B_2}", None),
        (r"\boxed{C = 3}", None),
        (r"\boxed{A + B}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{K}", None),
        (r"\boxed{b}", None),
        (r"\boxed{}", None),
        (r"\boxed{A} no, \boxed{B}", "B"),
        ("The answer is (E).", "E"),
        ("The answer is **E**", "E"),
        ("The final answer is: E\nThis is all.", "E"),
        ("Answer: A. No: the answer is B", "B"),
        ("Answer: A, C", "A, C"),
        ("Answer: A because it is", "A"),
        ("The answer is A dog", None),
        ("The answer is B or C", None),
        ("The answer is B2", None),
        ("The answer is Because", None),
        ("I do not know", None),
    ],
)
def test_openscience_answers(text: str, answer: str | None) -> None:
    assert openscience.extract_answer(text) == answer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_answers_between_tags_are_numbers_and_nothing_else(tmp_path: Path) -> None:
    task = TASKS["gsm8k_tags"]
    for text, answer in (
        ("<reasoning>\n9 + 9\n</reasoning>\n<answer>\n18\n</answer>\n", "18"),
        ("<answer>5</answer> no: <answer>$1,018.0</answer>", "1018"),
        ("<answer>18</answer> no: <answer>19", "18"),
        ("<answer>18 apples</answer>", None),
        ("<answer></answer>", None),
        ("18", None),
        ("#### 18", None),
    ):
        assert task.extract(text) == answer, text
    official = {"question": "9 + 9?", "answer": "9 + 9 = 18. #### 18"}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(official) + "\n")
    (asked,) = questions(str(file), "gsm8k_tags")
    assert task.prepare is not None
    (prepared,) = task.prepare([str(file)] * 2, argparse.Namespace())["test"]
    file.write_text(json.dumps(prepared) + "\n")
    assert questions(str(file), "gsm8k_tags") == [asked] == [(prepared["prompt"], "18")]
    assert prepared["prompt"].endswith("</answer>\n\n9 + 9?")


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("3 * 7 = 21. <answer>3 * 7 + 4</answer>", True),
        ("<answer>4 + 7*3</answer> or <answer>(3*7)+4</answer>", True),
        ("<answer>4 * 7 - 3</answer>", True),
        ("<answer>3 * 7 + 4 = 25</answer>", False),
        ("<answer>3 * 7</answer>", False),
        ("<answer>3 * 7 + 4 + 0</answer>", False),
        ("<answer>7 + 3 + 4</answer>", False),
        ("<answer>7 / (3 - 3) + 4</answer>", False),
        ("<answer>(3 * 7 + 4</answer>", False),
        ("<answer></answer>", False),
        ("<answer>" + "(" * 10_000 + "3 * 7 + 4</answer>", False),
        ("3 * 7 + 4", False),
    ],
)
def test_countdown_takes_any_expression_of_the_same_numbers_and_value(response: str, right: bool) -> None:
    task = TASKS["countdown"]
    answer = task.extract(response)
    reference = task.reference("4 * 7 = 28. 28 - 3 = 25. <answer>4 * 7 - 3</answer>")
    assert (answer is not None and task.same(answer, reference)) == right


def test_numbers_with_a_point_are_not_made_of_others() -> None:
    assert not TASKS["countdown"].same("3.5 * 24", "(24 + 3 + 5 - 5) * 3 + 3")
    assert not TASKS["countdown"].same("3.5 * 24", "3 * 5 * 24")
    assert not TASKS["countdown"].same("2.0 * 3", "6 * 2 / 2")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1</answer>", "1234341221434321"),
        ("<answer>1234\n3412\n2143\n4321 done</answer>", "1234341221434321"),
        ("<answer>12</answer>", "12" + "0" * 14),
        ("1 2 3 4", None),
    ],
)
def test_sudoku_is_its_sixteen_digits(response: str, answer: str | None) -> None:
    assert TASKS["sudoku"].extract(response) == answer


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_generated_puzzles_are_questions(name: str, tmp_path: Path) -> None:
    generate = {"countdown": countdown.generate, "sudoku": sudoku.generate}[name]
    records = generate({"train": 1, "validation": 1, "test": 20}, 3)["test"]
    task = TASKS[name]
    for record, (prompt, answer) in zip(records, questions(write(tmp_path / "test.jsonl", records), name), strict=True):
        predicted = task.extract(str(record["response"]))
        assert prompt == record["prompt"]
        assert predicted is not None
        assert task.same(predicted, answer)
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "Numbers 1 2 3:", "response": "1 + 2 + 3"}) + "\n")
    with pytest.raises(UserError, match=r"test\.jsonl, line 1.*<answer>"):
        questions(str(tmp_path / "test.jsonl"), name)
