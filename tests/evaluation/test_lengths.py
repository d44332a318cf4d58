"""Prompts that leave what follows them no room in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.prompts import read_prompts
from megatron_mdm.data.records import BadRecords
from megatron_mdm.evaluation.measure import Source
from megatron_mdm.evaluation.measures import MEASURES
from megatron_mdm.objectives import objective_of
from tests.small import small_config, small_model, word_tokenizer

FITS = {"prompt": "a b", "response": "#### 1", "choices": ["c", "d"], "answer": 0}
TOO_LONG = {**FITS, "prompt": " ".join("word" for _ in range(60)), "choices": ["c", "d e f g h"]}
MODEL = small_model()  # 64 tokens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (FITS, TOO_LONG)), encoding="utf-8")
    return path


def measured(name: str, file: Path, on_error: str = "stop", **changes: Any) -> Any:
    """What evaluates, once the data are read."""
    measure = MEASURES[name]
    config = small_config(file.parent)
    return measure.prepare(
        Source(str(file), 0, on_error), measure.settings(**changes), config, word_tokenizer(), objective_of(config)
    )


def test_room_is_what_the_model_was_trained_for() -> None:
    room = Room.of(MODEL, extrapolate=False, gen_length=16)
    room.check(48)
    with pytest.raises(
        ValueError, match=r"49 tokens of prompt and 16 of gen_length are 65, .*'model.max_sequence_length' 64"
    ):
        room.check(49)
    room.check(60, 4, "a choice")
    with pytest.raises(ValueError, match="60 tokens of prompt and 5 of a choice are 65"):
        room.check(60, 5, "a choice")
    Room.of(MODEL, extrapolate=True, gen_length=16).check(1000)


@pytest.mark.parametrize(
    ("name", "changes", "behind"),
    [("gsm8k", {"gen_length": 32}, "32 of gen_length"), ("multiple_choice", {}, "5 of a choice")],
)
def test_evaluation_names_the_record_and_both_lengths(
    name: str, changes: dict[str, Any], behind: str, file: Path
) -> None:
    with pytest.raises(UserError, match=f"line 2: 60 tokens of prompt and {behind} are .* 64; .*extrapolate=true"):
        measured(name, file, **changes)
    measured(name, file, "skip", **changes)
    measured(name, file, extrapolate=True, **changes)


def test_prompts_to_be_answered(file: Path) -> None:
    data = small_config(file.parent).data
    room = Room.of(MODEL, extrapolate=False, gen_length=8)
    with pytest.raises(UserError, match=f"{file}, line 2: 60 tokens of prompt and 8 of gen_length are 68"):
        read_prompts(str(file), word_tokenizer(), data, BadRecords(), room)
    bad = BadRecords("skip")
    assert len(read_prompts(str(file), word_tokenizer(), data, bad, room)) == bad.count == 1


def test_perplexity_of_samples_that_the_model_was_not_trained_for(tmp_path: Path) -> None:
    """Even where data.max_length says otherwise."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input_ids": [5] * 80, "prompt_length": 4}) + "\n", encoding="utf-8")
    config = small_config(tmp_path, data={"max_length": 100})
    measure = MEASURES["perplexity"]
    with pytest.raises(UserError, match=r"no sample left; 1 longer than 'data.max_length' 64"):
        measure.prepare(Source(str(path), 0), measure.settings(), config, word_tokenizer(), objective_of(config))
    measure.prepare(
        Source(str(path), 0), measure.settings(extrapolate=True), config, word_tokenizer(), objective_of(config)
    )
