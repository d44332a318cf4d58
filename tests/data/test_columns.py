"""The columns that people's data have, in files for training, for scoring and of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import Prompt, conversation, prompt_and_response, prompt_of
from megatron_mdm.data.prompts import read_prompts
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.sft import encode_prompt, read_sft
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.data.test_records import write_byte_tokenizer

PLAIN = DataConfig(train="", max_length=64)
TURNS = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B")]
TWO = [("user", "U"), ("assistant", "A")]


def openai(turns: list[tuple[str, str]], role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: who, content: text} for who, text in turns]


SHAREGPT = [("system", "S"), ("human", "U"), ("gpt", "A"), ("human", "V"), ("gpt", "B")]
PARTS = [{"type": "text", "text": ""}, {"type": "text", "text": "U"}]
FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "gsm8k": ({"question": "U", "answer": "A"}, TWO),
    "prompt and response": ({"prompt": "U", "response": "A", "id": 3}, TWO),
    "prompt and completion": ({"prompt": "U", "completion": "A"}, TWO),
    "question and response": (
        {"system_prompt": "S", "question": "U", "response": "A"},
        [("system", "S"), ("user", "U"), ("assistant", "A")],
    ),
    "query and response": ({"query": "U", "response": "A"}, TWO),
    "input and output": ({"input": "U", "output": "A"}, TWO),
    "problem and solution": ({"problem": "U", "solution": "A", "answer": "1"}, TWO),
    "alpaca": ({"instruction": "U", "input": "V", "output": "A"}, [("user", "U\nV"), ("assistant", "A")]),
    "alpaca without input": ({"instruction": "U", "input": "", "output": "A", "text": "U A"}, TWO),
    "alpaca with null input": ({"instruction": "U", "input": None, "output": "A"}, TWO),
    "alpaca with history": (
        {"instruction": "V", "input": "", "output": "B", "system": "S", "history": [["U", "A"]]},
        TURNS,
    ),
    "dolly": ({"instruction": "U", "context": "V", "response": "A"}, [("user", "U\nV"), ("assistant", "A")]),
    "messages": ({"messages": openai(TURNS)}, TURNS),
    "messages beside a prompt": ({"prompt": "U", "messages": openai(TURNS)}, TURNS),
    "sharegpt": ({"conversations": openai(SHAREGPT, "from", "value")}, TURNS),
    "sharegpt with a system text": ({"system": "S", "conversations": openai(SHAREGPT[1:], "from", "value")}, TURNS),
    "conversation": ({"conversation": openai(TURNS)}, TURNS),
    "content parts": ({"messages": [{"role": "user", "content": PARTS}, *openai(TWO[1:])]}, TWO),
    "null content": ({"messages": [{"role": "system", "content": None}, *openai(TWO)]}, [("system", ""), *TWO]),
    "columns of a union": ({"prompt": None, "response": None, "messages": openai(TWO)}, TWO),
    "prompt and completion as messages": ({"prompt": openai(TURNS[:-1]), "completion": openai(TURNS[-1:])}, TURNS),
}


def said(turns: Prompt) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


@pytest.mark.parametrize("name", FORMS)
def test_known_columns(name: str) -> None:
    """All turns are trained; the last is scored, or answered again."""
    record, turns = FORMS[name]
    assert said(conversation(record, PLAIN)) == turns
    prompt, response = prompt_and_response(record, PLAIN)
    assert (said(prompt), response) == (turns[:-1], turns[-1][1])
    assert said(prompt_of(record, PLAIN)) == turns[:-1]


MAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"ask": "U", "reply": "A", "prompt": "x"}, {"columns": {"prompt": "ask", "response": "reply"}}),
    "texts before messages": (
        {"messages": openai(TURNS), "ask": "U", "reply": "A"},
        {"columns": {"prompt": "ask", "response": "reply"}},
    ),
    "the prompt alone": ({"ask": "U", "completion": "A"}, {"columns": {"prompt": "ask"}}),
    "one of several": ({"question": "U", "answer": "A", "response": "x"}, {"columns": {"response": "answer"}}),
    "turns": ({"dialog": openai(TWO)}, {"columns": {"messages": "dialog"}}),
    "turns of other names": (
        {"dialog": openai([("customer", "U"), ("Agent", "A")], "who", "text")},
        {
            "columns": {"messages": "dialog", "role": "who", "content": "text"},
            "roles": {"customer": "user", "Agent": "assistant"},
        },
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_other_columns_are_named(name: str) -> None:
    record, changes = MAPPED[name]
    data = PLAIN.model_validate({**PLAIN.model_dump(), **changes})
    assert said(conversation(record, data)) == TWO
    assert said(prompt_of(record, data)) == TWO[:1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"text": "U", "label": 1}, "found text, label; name yours in 'data.columns'"),
    "two responses": ({"question": "U", "answer": "A", "response": "B"}, "several columns may be prompt and response"),
    "no assistant": (
        {"conversations": openai([("human", "U"), ("Agent", "A")], "from", "value")},
        r"no turn of the role 'assistant' \(found Agent, user\); say in 'data.roles'",
    ),
    "texts for turns": ({"messages": ["U", "A"]}, "'messages' must be a list of objects.*; turn 1 is str"),
    "no content": ({"messages": [{"role": "user"}]}, "turn 1 has role"),
    "no turns": ({"messages": []}, "found an empty list"),
    "half a pair": ({"instruction": "U", "history": [["U"]], "output": "A"}, "'history' must be a list of pairs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_said(name: str) -> None:
    record, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        conversation(record, PLAIN)
    with pytest.raises(ValueError, match=r"no column 'ask', which 'data\.columns' names as prompt; found "):
        conversation(record, PLAIN.model_copy(update={"columns": {"prompt": "ask"}}))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "datasets"])
def test_files_of_every_kind_give_the_same_samples(suffix: str, tmp_path: Path) -> None:
    """Through the tokenizer, as training and generation read them."""
    folder = write_byte_tokenizer(tmp_path)
    records = [
        {"conversations": openai(SHAREGPT, "from", "value")},
        {"conversations": openai(SHAREGPT[1:3], "from", "value")},
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "datasets":  # a folder of files
        (tmp_path / "set").mkdir()
        path = tmp_path / "set" / "train.jsonl"
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    path = path.parent if suffix == "datasets" else path
    data = DataConfig(train="", tokenizer=str(folder), max_length=64)
    tokenizer = load_tokenizer(data)
    samples = read_sft(str(path), tokenizer, data, tokenizer.num_ids).samples
    assert [tokenizer.decode_all(sample.tokens) for sample in samples] == ["S\nU\nA⏎V\nB⏎", "U\nA⏎"]
    assert [tokenizer.decode_all(sample.tokens[sample.eligible]) for sample in samples] == ["A⏎B⏎", "A⏎"]
    prompts = read_prompts(str(path), tokenizer, data, BadRecords())
    assert [tokenizer.decode_all(prompt.ids) for prompt in prompts] == ["S\nU\nA⏎V\n", "U\n"]
    for prompt, sample in zip(prompts, samples):  # what stands before the last response in training
        assert prompt.ids == sample.tokens[: len(prompt.ids)].tolist()
    assert prompts[1].as_record() == {"prompt": "U"}
    assert prompts[0].as_record() == {"messages": openai(TURNS[:-1])}
    assert prompts[1].ids == encode_prompt("U", tokenizer)


def test_labels_of_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"tokens": [9, 8, 7, 6], "labels": [-100, 8, -100, 6]}))
    data = DataConfig(train="", mask_token=60, pad_token=0, eos_token=1, max_length=9, columns={"input_ids": "tokens"})
    (sample,) = read_sft(str(path), load_tokenizer(data), data, 61).samples
    assert sample.eligible.tolist() == [False, True, False, True]


def test_bad_prompts(tmp_path: Path) -> None:
    """By line, or left out and counted."""
    data = DataConfig(train="", tokenizer=str(write_byte_tokenizer(tmp_path)), max_length=64)
    tokenizer = load_tokenizer(data)
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "cut \\ud83d"}\n{"question": "U"}\n{"messages": [{"role": "assistant", "content": "A"}]}\n'
    )
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: holds \\ud83d"):
        read_prompts(str(path), tokenizer, data, BadRecords())
    bad = BadRecords("skip")
    assert [prompt.as_record() for prompt in read_prompts(str(path), tokenizer, data, bad)] == [{"prompt": "U"}]
    assert [message.partition(", ")[2] for message in bad.first] == [
        "line 1: holds \\ud83d, half of a surrogate pair, which is no character",
        "line 3: 'messages' holds nothing to be answered",
    ]
