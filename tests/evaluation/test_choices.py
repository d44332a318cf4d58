"""Questions with choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.evaluation.perplexity import read_choices


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
