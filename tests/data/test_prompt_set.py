"""Prompts for reinforcement learning: what is read of their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig, RunConfig
from megatron_mdm.data.prompt_set import PromptDataset, read_prompt_set
from megatron_mdm.data.splits import read_splits
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.rl.prompts import RolloutPrompts
from tests.small import EOS, MASK, VOCAB, small_config, word_tokenizer, write_ids


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(path: str, gen_length: int = 8, **changes: Any) -> PromptDataset:
    settings = {"train": path, "format": "prompts", "max_length": 20, **changes}
    return read_prompt_set(path, word_tokenizer(), DataConfig.model_validate(settings), VOCAB, gen_length)


def test_records_keep_their_columns_and_give_prompts_as_generation_does(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"question": "a bb ccc", "answer": "dddd e", "numbers": [1, 2]},
        {"prompt": "a bb"},
        {"messages": [{"role": "user", "content": "aa"}], "reference": "own"},
        {"messages": [{"role": "user", "content": "aa"}, {"role": "assistant", "content": "b"}]},
        {"question": "a", "answer": 42},
    )
    data = read(path)
    assert [prompt.ids for prompt in data.prompts] == [[11, 12, 13], [11, 12], [12], [12], [11]]
    assert [prompt.turns[-1].content for prompt in data.prompts] == ["a bb ccc", "a bb", "aa", "aa", "a"]
    assert data.columns[0] == {
        "question": "a bb ccc",
        "answer": "dddd e",
        "numbers": [1, 2],
        "reference": "dddd e",
        "where": f"{path}, line 1",
    }
    assert [record["reference"] for record in data.columns[1:]] == [None, "own", "b", None]
    assert data.columns[4]["answer"] == 42
    tokens, eligible = data.samples[0].tokens, data.samples[0].eligible
    assert tokens.tolist() == [11, 12, 13, 14, 11, EOS]
    assert eligible.tolist() == [False] * 3 + [True] * 3
    np.testing.assert_array_equal(data.num_eligible(), [3, 0, 0, 2, 0])


def test_a_prompt_must_leave_room_for_its_completion(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"prompt": "a " * 12}, {"prompt": "a " * 13}, {"prompt": "a", "response": "b " * 40}
    )
    data = read(path)
    assert (len(data), data.num_too_long) == (2, 1)
    assert len(data.samples[1].tokens) == 20  # the record's own response is cut; it is not what is generated
    with pytest.raises(
        UserError, match=r"line 2: 13 tokens of prompt and 8 of 'rl.generation.gen_length' exceed .* 20"
    ):
        read(path, too_long="error")
    with pytest.raises(UserError, match=r"no prompt left; 3 leave less than 20 tokens"):
        read(path, gen_length=20)


def test_bad_prompts_are_named_or_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "a"},
        {"prompt": ""},
        {"text": "a"},
        {"input_ids": [2, MASK], "labels": [2, -100]},
    )
    with pytest.raises(UserError, match=r"line 2: the prompt is empty"):
        read(path)
    data = read(path, on_error="skip")
    assert (len(data), data.num_bad) == (1, 3)
    assert data.first_bad[0] == f"{path}, line 2: the prompt is empty"


def test_token_ids_are_prompts_up_to_the_first_target(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"input_ids": [5, 6, 7, 8], "prompt_length": 2}, {"input_ids": [5, 6], "prompt_length": 2}
    )
    data = read(path)
    assert [prompt.ids for prompt in data.prompts] == [[5, 6], [5, 6]]
    assert [record["reference"] for record in data.columns] == ["w7 w8", None]
    assert data.prompts[0].turns[0].content == "w5 w6"


def run(folder: Path, **data: Any) -> RunConfig:
    return small_config(
        folder,
        data={"format": "prompts", **data},
        rl={"rewards": [{"name": "exact_match"}], "generation": {"gen_length": 32}},
    )


def test_splits_blends_and_the_order_of_rollouts(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 20)
    write_ids(tmp_path / "other.jsonl", 10, seed=1)
    tokenizer = load_tokenizer(run(tmp_path).data)
    blend = {str(tmp_path / "train.jsonl"): 0.5, str(tmp_path / "other.jsonl"): 0.5}
    train, validation = read_splits(run(tmp_path, train=blend, validation_fraction=0.2), tokenizer)
    assert isinstance(train, PromptDataset)
    assert isinstance(validation, PromptDataset)
    assert (len(train), len(validation)) == (32, 6)
    assert len(train.prompts) == len(train.columns) == 32
    held_out = {record["where"] for record in validation.columns}
    assert not held_out & {record["where"] for record in train.columns}
    for prompt, record, sample in zip(train.prompts, train.columns, train.samples):
        assert record["input_ids"] == sample.tokens.tolist()
        assert record["input_ids"][: record["prompt_length"]] == prompt.ids
    order = RolloutPrompts(train, 12, seed=3)
    rows = [order.rows(rollout) for rollout in range(8)]
    for epoch in range(3):
        assert sorted(np.concatenate(rows)[32 * epoch : 32 * (epoch + 1)]) == list(range(32))
    again = RolloutPrompts(train, 12, seed=3)
    np.testing.assert_array_equal(again.rows(7), rows[7])  # no other rollout has to be asked for
    assert again.prompts([4, 4]) == [train.prompts[4]] * 2
    assert again.texts([4]) == [train.prompts[4].turns[0].content]
    assert again.columns([4, 5])["input_ids"] == [train.columns[row]["input_ids"] for row in (4, 5)]


def test_the_length_of_a_completion_is_generations_own_unless_it_is_said() -> None:
    generation = GenerationConfig()
    config = run(Path())
    assert config.rl.gen_length == 32
    assert config.rl.model_copy(update={"generation": {}}).gen_length == generation.gen_length
