"""Conversations, templates, token ids with spans, lengths, bad records, and the public data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import BatchConfig, DataConfig
from megatron_mdm.data.loader import TrainLoader
from megatron_mdm.data.sft import SftDataset, encode_prompt, read_sft
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.training.calibrate import as_trained
from megatron_mdm.training.inputs import RunData
from tests.ranks import run_program_ranks
from tests.small import small_config

LLADA_TOKENS = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with LLaDA's special tokens and a chat template of its own."""
    folder = tmp_path_factory.mktemp("chat")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256, special_tokens=["</s>", *LLADA_TOKENS], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["a"], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "</s>"}))
    return folder


def read(folder: Path, records: list[Any], **changes: Any) -> tuple[SftDataset, Tokenizer]:
    path = folder / "records.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    data = DataConfig(train="", tokenizer=str(folder), **{"max_length": 200, **changes})
    tokenizer = load_tokenizer(data)
    return read_sft(str(path), tokenizer, data, tokenizer.num_ids), tokenizer


def learnt_and_given(data: SftDataset, tokenizer: Tokenizer, row: int = 0) -> tuple[str, str]:
    sample = data.samples[row]
    return tokenizer.decode_all(sample.tokens[sample.eligible]), tokenizer.decode_all(sample.tokens[~sample.eligible])


@pytest.mark.parametrize(
    ("template", "learnt", "given"),
    [
        ("plain", "Me.⏎So.⏎", "Be brief.\nWho?\nWhy?\n"),
        ("llada", "Me.⏎So.⏎", "system\n\nBe brief.⏎user\n\nWho?⏎assistant\n\nuser\n\nWhy?⏎assistant\n\n"),
        ("mmada", "Me.⏎So.⏎", "system\nBe brief.⏎user\nWho?⏎assistant\nuser\nWhy?⏎assistant\n"),
        ("tokenizer", "Me.⏎So.⏎", "[system]Be brief.[user]Who?[assistant][user]Why?[assistant]"),
    ],
)
def test_only_the_assistants_turns_are_learnt(template: str, learnt: str, given: str, folder: Path) -> None:
    data, tokenizer = read(folder, [{"messages": CONVERSATION}], template=template)
    assert learnt_and_given(data, tokenizer) == (
        learnt,
        given,
    )  # the decoder leaves out special tokens that end nothing
    last, _ = read(folder, [{"messages": CONVERSATION}], template=template, eligible_turns="last")
    assert learnt_and_given(last, tokenizer)[0] == learnt[len(learnt) // 2 :]
    assert last.samples[0].tokens.tolist() == data.samples[0].tokens.tolist()


@pytest.mark.parametrize("template", ["plain", "llada", "mmada", "tokenizer"])
def test_a_prompt_is_what_stands_before_the_response(template: str, folder: Path) -> None:
    """Evaluation and training put the same tokens before an answer."""
    data, tokenizer = read(folder, [{"question": "1 + 1?", "answer": "2"}], template=template)
    sample = data.samples[0]
    assert encode_prompt("1 + 1?", tokenizer) == sample.tokens[~sample.eligible].tolist()


def test_llada_template_has_its_special_tokens(folder: Path, tmp_path: Path) -> None:
    data, tokenizer = read(folder, [{"prompt": "a", "response": "b"}], template="llada")
    bos, start, end, eot = (tokenizer.backend.token_id(token) for token in LLADA_TOKENS)
    tokens = data.samples[0].tokens.tolist()
    assert tokens[0] == bos
    assert [tokens.count(token) for token in (start, end, eot)] == [2, 2, 2]
    assert tokens[-1] == eot
    assert data.samples[0].eligible[-1]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"'data.template' llada needs the token <\|startoftext\|>"):
        load_tokenizer(DataConfig(train="", tokenizer=str(tmp_path), max_length=9, template="llada"))
    with pytest.raises(UserError, match=r"'data.template' tokenizer needs a chat template"):
        load_tokenizer(DataConfig(train="", tokenizer=str(tmp_path), max_length=9, template="tokenizer"))


@pytest.mark.parametrize("template", ["plain", "llada", "mmada", "tokenizer"])
def test_a_response_ends_at_the_first_end_token(template: str, folder: Path) -> None:
    """The eos, the template's end of turn, and those that are named: what follows them is no text of the response."""
    named = ["<|startoftext|>", 70]
    data = DataConfig(train="", tokenizer=str(folder), max_length=9, template=template, end_tokens=named)
    tokenizer = load_tokenizer(data)
    of_turn = {"plain": set(), "tokenizer": {"</s>"}}.get(template, {"<|eot_id|>"})
    ends = {tokenizer.backend.token_id(token) for token in {"</s>", "<|startoftext|>", *of_turn}} | {70}
    assert tokenizer.other_end_ids | {tokenizer.eos_id} == ends
    said = tokenizer.encode("So.")
    behind = tokenizer.encode("junk #### 9")
    for end in ends:
        assert tokenizer.decode([*said, end, *behind, tokenizer.eos_id]) == "So."
        assert tokenizer.decode_all([*said, end, *behind]) == "So.⏎junk #### 9"
        assert SpecialIds.of(tokenizer).ends(torch.tensor([*said, end, *behind])).tolist() == [
            token == end for token in [*said, end, *behind]
        ]
    with pytest.raises(UserError, match=r"'<nothing>' ends a response, but .* has no such token"):
        load_tokenizer(data.model_copy(update={"end_tokens": ("<nothing>",)}))


def test_what_follows_the_last_answer_is_left_out(folder: Path) -> None:
    """When it is generated, nothing stands behind it."""
    for template in ("plain", "llada", "tokenizer"):
        whole, _ = read(folder, [{"messages": CONVERSATION}], template=template)
        longer, _ = read(folder, [{"messages": [*CONVERSATION, {"role": "user", "content": "Ah."}]}], template=template)
        assert longer.samples[0].tokens.tolist() == whole.samples[0].tokens.tolist()
        assert longer.samples[0].eligible[-1]


def test_spans_of_token_ids(folder: Path) -> None:
    data, _ = read(folder, [{"input_ids": [9, 8, 7, 6, 5, 4], "spans": [[1, 3], [5, 6]]}])
    assert data.samples[0].eligible.tolist() == [False, True, True, False, False, True]
    data, _ = read(folder, [{"input_ids": [9, 8, 7, 6], "prompt_length": 3}])
    assert data.samples[0].eligible.tolist() == [False, False, False, True]
    with pytest.raises(UserError, match=r"line 1: the span \[1, 9\] does not fit 2 'input_ids'"):
        read(folder, [{"input_ids": [9, 8], "spans": [[1, 9]]}])


def test_too_long(folder: Path) -> None:
    records = [
        {"prompt": "a", "response": "b" * 50},
        {"prompt": "a" * 50, "response": "b"},
        {"prompt": "", "response": "b"},
    ]
    dropped, _ = read(folder, records, max_length=20)
    assert (len(dropped), dropped.num_too_long) == (1, 2)
    cut, _ = read(folder, records, max_length=20, too_long="truncate")
    assert (len(cut), cut.num_too_long) == (2, 2)  # the second would have nothing left to learn
    assert cut.lengths().tolist() == [20, 3]
    assert cut.samples[0].tokens.tolist() == read(folder, records)[0].samples[0].tokens[:20].tolist()
    with pytest.raises(UserError, match=r"line 1: 53 tokens exceed 'data.max_length' 20"):
        read(folder, records, max_length=20, too_long="error")
    fitting, _ = read(folder, records, max_length=53, too_long="error")
    assert (fitting.lengths().tolist(), fitting.num_too_long) == ([53, 53, 3], 0)


def test_the_last_turn_alone_is_learnt_where_that_is_asked_for(folder: Path) -> None:
    for template in ("plain", "tokenizer"):
        data, tokenizer = read(folder, [{"messages": CONVERSATION}], template=template, eligible_turns="last")
        assert learnt_and_given(data, tokenizer)[0] == "So.⏎"


BAD = {
    "no JSON": ('{"prompt": "a"', "not valid JSON"),
    "no object": ("[1, 2]", "expected an object, found list"),
    "no fields": ({"text": "a"}, "expected the columns question and answer"),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "holds no turn of the role 'assistant'"),
    "no content": ({"messages": [{"role": "user"}]}, "'messages' must be a list of objects"),
    "no response": ({"prompt": "a", "response": ""}, "no eligible token"),
    "no vocabulary": ({"input_ids": [1, 999_999], "prompt_length": 1}, "outside the vocabulary"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records(name: str, folder: Path) -> None:
    """The line is named; skipped, they are counted and the first ones kept."""
    record, message = BAD[name]
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(UserError, match=f"line 3: .*{message}"):
        read(folder, [good, good, record, good])
    data, _ = read(folder, [good, good, record, good], on_error="skip")
    assert (len(data), data.num_bad) == (3, 1)
    assert "line 3: " in data.first_bad[0]


def test_broken_utf8(folder: Path) -> None:
    path = folder / "broken.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff", "response": "b"}\n')
    data = DataConfig(train="", tokenizer=str(folder), max_length=99)
    tokenizer = load_tokenizer(data)
    with pytest.raises(UserError, match=r"broken\.jsonl, line 2: not UTF-8 \(byte 0xff, 12 bytes in\)"):
        read_sft(str(path), tokenizer, data, 300)
    assert read_sft(str(path), tokenizer, data.model_copy(update={"on_error": "skip"}), 300).num_bad == 1


def test_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"messages": [CONVERSATION], "other": [1]})
    parquet.write_table(table, folder / "a.parquet")
    data = DataConfig(train="", tokenizer=str(folder), max_length=200)
    tokenizer = load_tokenizer(data)
    from_parquet = read_sft(str(folder / "a.parquet"), tokenizer, data, tokenizer.num_ids)
    from_lines, _ = read(folder, [{"messages": CONVERSATION}])
    assert from_parquet.samples[0].tokens.tolist() == from_lines.samples[0].tokens.tolist()
    (folder / "b.parquet").write_text("nothing")
    with pytest.raises(UserError, match=r"b\.parquet: not a parquet file"):
        read_sft(str(folder / "b.parquet"), tokenizer, data, tokenizer.num_ids)


def test_eos_padding_is_learnt_up_to_the_longest_of_the_global_batch(folder: Path) -> None:
    data, tokenizer = read(folder, [{"prompt": "a", "response": "b" * size} for size in range(1, 9)])
    batch = BatchConfig(global_size=4, micro_size=1)
    loader = TrainLoader(
        data, batch=batch, views=1, data_rank=0, data_size=1, pad_id=1, seed=0, eos_padding=tokenizer.eos_id
    )
    longest = data.lengths()[loader.sample_ids(0)].max()
    local = loader.batch(0)
    for micro in local.micro_batches:
        assert micro.tokens.shape == (1, longest)
        length = int(data.lengths()[micro.sample_ids[0]])
        assert (micro.tokens[0, length - 1 :] == tokenizer.eos_id).all()
        assert micro.eligible[0, 2:].all()
    assert local.global_batch.num_eligible == 4 * (longest - 2)


def test_calibration_sees_the_eos_padding_that_training_learns(folder: Path) -> None:
    """The samples of the first epoch, of which the last batch holds two of the second."""
    data, tokenizer = read(folder, [{"prompt": "a", "response": "b" * size} for size in range(1, 11)])
    batch = {"global_size": 4, "micro_size": 1}
    config = small_config(folder, data={"eos_padding": True}, batch=batch)
    run_data = RunData(tokenizer, data, None)
    seen = as_trained(config, run_data).samples
    loader = TrainLoader(
        data,
        batch=config.batch,
        views=1,
        data_rank=0,
        data_size=1,
        pad_id=1,
        seed=config.seed,
        eos_padding=tokenizer.eos_id,
    )
    trained: dict[int, list[int]] = {}
    for step in range(3):
        for micro in loader.batch(step).micro_batches:
            trained.setdefault(int(micro.sample_ids[0]), micro.tokens[0].tolist())
    assert {row: seen[row].tokens.tolist() for row in range(10)} == trained
    assert [int(sample.eligible.sum()) for sample in seen] == [len(trained[row]) - 2 for row in range(10)]
    assert as_trained(small_config(folder, batch=batch), run_data) is data


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(name: str, records: dict[str, list[dict[str, Any]]], folder: Path, *arguments: str) -> Path:
    for file, rows in records.items():
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "out"
    paths = [str(folder / file) for file in records]
    program = ["task", name, *paths, "--output", str(output), *arguments]
    result = run_program_ranks("tools/prepare_data.py", program)[0]
    assert result.exit_code == 0, result.stderr
    return output


def test_public_data_sets(folder: Path, tmp_path: Path) -> None:
    question = {"question": "1 + 1?", "answer": "2\n#### 2"}
    output = prepare("gsm8k", {"train.jsonl": [question] * 3, "test.jsonl": [question]}, tmp_path)
    assert (len(lines(output / "train.jsonl")), lines(output / "test.jsonl")) == (3, [question])
    table = {"title": "crops", "table": "| a | b |\n| 1 | 2 |", "question": "b?", "answer": [2.0], "id": "x"}
    output = prepare("hitab", {"a.jsonl": [table], "b.jsonl": [table], "c.jsonl": [table]}, tmp_path)
    row = lines(output / "test.jsonl")[0]
    assert row["response"] == "\\boxed{2}"
    assert table["table"] in row["prompt"]
    rows = [{"input": f"q{number}", "output": "\\boxed{A}"} for number in range(6200)]
    output = prepare("openscience", {"o.jsonl": rows}, tmp_path)
    train, validation, test = (lines(output / f"{name}.jsonl") for name in ("train", "validation", "test"))
    assert (len(train), len(validation)) == (4500, 500)
    assert {row["prompt"] for row in train + validation} == {f"q{number}" for number in range(5000)}
    assert [row["prompt"] for row in test] == [f"q{number}" for number in range(5000, 6000)]


def test_text_to_image(folder: Path, tmp_path: Path) -> None:
    rows = [{"caption": "a ship", "image_codes": [5, 0, 8191]}] * 10
    output = prepare("text-to-image", {"i.jsonl": rows}, tmp_path, "--tokenizer", str(folder))
    row = lines(output / "train.jsonl")[0]
    (begin, end), ids = row["spans"][0], row["input_ids"]
    assert ids[begin:end] == [126_354, 126_349, 134_540]
    assert (ids[0], ids[begin - 1], ids[end]) == (126_088, 126_084, 126_085)
    assert len(lines(output / "validation.jsonl")) == 1


def test_inspect_shows_what_is_learnt(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": CONVERSATION[: 3 + 2 * (n % 2)]}) + "\n" for n in range(20)))
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 8}
                | {"max_sequence_length": 64},
                "data": {"train": str(path), "tokenizer": str(folder), "max_length": 64},
                "batch": {"global_size": 8, "micro_size": 4},
                "optimizer": {"lr": 1e-3},
                "schedule": {"steps": 1},
                "checkpoint": {"directory": str(tmp_path / "run")},
            }
        )
    )
    arguments = ["inspect", "--config", str(config), "--output", str(tmp_path / "look"), "--no-color"]
    result = run_program_ranks("tools/prepare_data.py", arguments)[0]
    assert result.exit_code == 0, result.stderr
    assert "Be brief.\nWho?\n⟦Me.⏎⟧Why?\n⟦So.⏎⟧" in result.stdout
    report = json.loads((tmp_path / "look" / "inspect.json").read_text())
    efficiency = {mode: values["padding_efficiency"] for mode, values in report["modes"].items()}
    assert efficiency["padded"] < efficiency["bucketed"] <= efficiency["packed"] == 1.0
    assert (tmp_path / "look" / "lengths.png").read_bytes().startswith(b"\x89PNG")
