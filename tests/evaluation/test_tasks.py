"""Final answers of tasks: what is taken from a response and what counts as the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.evaluation.exact_match import read_questions
from megatron_mdm.evaluation.perplexity import read_choices
from megatron_mdm.evaluation.tasks import TASKS, hitab, openscience


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is \boxed{8}", "8"),
        (r"\boxed{1} no, \boxed{2}.", "2"),
        (r"\boxed{ \text{Medical Park Antalyaspor} }", "medical park antalyaspor"),
        (r"\boxed{45\%}", "45%"),
        (r"\boxed{\$1,234.}", "$1,234"),
        (r"\boxed{\frac{1}{2}}", "frac{1}{2}"),
        (r"\boxed{a", None),
        (r"\boxed{}", None),
        ("8", None),
    ],
)
def test_hitab_answers(text: str, answer: str | None) -> None:
    assert hitab.extract_answer(text) == answer


def test_hitab_compares_numbers() -> None:
    assert hitab.same("1,234", "1234")
    assert hitab.same("8.0", "8")
    assert not hitab.same("8", "9")
    assert not hitab.same("eight", "8")


def test_hitab_records(tmp_path: Path) -> None:
    record = {"title": "goals", "table": "| a | b |\n| 1 | 2 |", "question": "what is b?", "answer": [2.0]}
    path = tmp_path / "hitab.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    ((prompt, answer),) = read_questions(str(path), TASKS["hitab"], 0)
    assert answer == "2"
    assert "| 1 | 2 |" in prompt
    assert prompt.endswith("what is b?")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Thus \boxed{B}", "B"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{D. Mitosis}", "D"),
        (r"\boxed{(A)}", "A"),
        (r"\boxed{Because}", None),
        ("The answer is (E).", "E"),
        ("Answer: A. No: the answer is B", "B"),
        ("I do not know", None),
    ],
)
def test_openscience_answers(text: str, answer: str | None) -> None:
    assert openscience.extract_answer(text) == answer


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "choices": "b", "answer": 0}, "list of strings"),
        ({"prompt": "a", "choices": ["b"], "answer": 1}, "index of one of the 1"),
        ({"prompt": "a", "choices": ["b", ""], "answer": 0}, "a choice is empty"),
    ],
)
def test_bad_choices(record: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        read_choices(str(path), 0)
