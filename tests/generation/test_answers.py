"""A file of responses that an interrupted job goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.data.conversation import USER, Message
from megatron_mdm.data.prompts import EncodedPrompt
from tests.ranks import run_ranks


def begun_and_gone_on(path: Path, first: list[int], second: list[int]) -> list[int]:
    """Prompts that are missing after a job that answered one of two."""
    from megatron_mdm.generation.answers import AnswerFile
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    for ids in (first, second):
        prompts = [EncodedPrompt([Message(USER, "Q")], ids), EncodedPrompt([Message(USER, "R")], [7])]
        file = AnswerFile(path, prompts, {"gen_length": 8}, context)
        missing = file.missing
        if ids is first:
            file.add({0: {"response": "A", "steps": 1}})
    return missing


def test_the_same_prompts_go_on(tmp_path: Path) -> None:
    assert run_ranks(begun_and_gone_on, 1, tmp_path / "out.jsonl", [5, 6], [5, 6])[0] == [1]


def test_prompts_of_another_template_do_not(tmp_path: Path) -> None:
    """Or of another tokenizer, or of another day, where the template names it."""
    with pytest.raises(AssertionError, match=r"begun with prompts and their tokens \(sha256\)"):
        run_ranks(begun_and_gone_on, 1, tmp_path / "out.jsonl", [5, 6], [5, 9])
