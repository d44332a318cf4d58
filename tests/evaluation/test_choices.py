"""Questions with choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.records import BadRecords
from megatron_mdm.evaluation.perplexity import read_choices
from tests.small import word_tokenizer

DATA = DataConfig(train="", max_length=64)


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
        read_choices(str(path), 0, word_tokenizer(), DATA, BadRecords())
    path.write_text(path.read_text() + json.dumps({"question": "a", "choices": ["b", "c d"], "answer": 1}) + "\n")
    bad = BadRecords("skip")
    (question,) = read_choices(str(path), 0, word_tokenizer(), DATA, bad)
    assert (question.answer, list(map(len, question.choices)), bad.count) == (1, [1, 2], 1)
