"""Reading samples, tokenizers, splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.sft import blended, joined, read_sft, split_validation
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer, resolve_vocabulary
from megatron_mdm.data.word_problems import LARGEST, generate
from megatron_mdm.evaluation.tasks.gsm8k import extract_answer
from tests.ranks import run_program_ranks
from tests.small import small_model, write_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated problems with both kinds of tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    sizes = ["--train", "600", "--validation", "20", "--test", "20"]
    for path, arguments in (
        ("tools/prepare_data.py", ["arithmetic", "--output", str(folder), *sizes]),
        (
            "tools/train_tokenizer.py",
            [
                "--data",
                str(folder / "train.jsonl"),
                "--output",
                str(folder / "sp.model"),
                "--vocab-size",
                "300",
                "--model-type",
                "bpe",
                "--whole-numbers",
                str(LARGEST),
            ],
        ),
    ):
        result = run_program_ranks(path, arguments)[0]
        assert result.exit_code == 0, result.stderr
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    pieces.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    pieces.train_from_iterator([text for problem in generate(300, 0) for text in problem.values()], trainer)
    pieces.save(str(folder / "tokenizer.json"))
    return folder


def settings(max_length: int, **changes: Any) -> DataConfig:
    return DataConfig(train="x", max_length=max_length, **changes)


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    return load_tokenizer(DataConfig(train="x", tokenizer=str(folder / name), max_length=64))


@pytest.mark.parametrize("name", ["sp.model", "tokenizer.json"])
def test_tokenizer_round_trip_and_special_tokens(folder: Path, name: str) -> None:
    tokenizer = tokenizer_of(folder, name)
    text = "Tom has 12 apples."
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]).strip() == text
    assert tokenizer.decode([tokenizer.mask_id, *ids, tokenizer.pad_id]).strip() == text
    special = {tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id}
    assert len(special) == 3
    assert not special & set(ids)
    assert max(special) < tokenizer.num_ids
    assert resolve_vocabulary(small_model(vocab_size="tokenizer"), tokenizer).vocab_size == tokenizer.num_ids
    with pytest.raises(UserError, match=r"outside the vocabulary|smaller than the tokenizer"):
        resolve_vocabulary(small_model(vocab_size=50), tokenizer)


def test_a_vocabulary_holds_every_id(folder: Path) -> None:
    """The ids of special tokens, and the tokenizer's others."""
    file = str(folder / "tokenizer.json")
    tokenizer = load_tokenizer(DataConfig(train="x", tokenizer=file, max_length=64, mask_token=2, pad_token=0))
    with pytest.raises(UserError, match=r"'model.vocab_size' 200 is smaller than the tokenizer's \d+ ids"):
        resolve_vocabulary(small_model(vocab_size=200), tokenizer)
    ids_alone = load_tokenizer(DataConfig(train="x", mask_token=60, pad_token=0, eos_token=1, max_length=64))
    assert resolve_vocabulary(small_model(vocab_size=61), ids_alone).vocab_size == 61
    with pytest.raises(UserError, match=r"'data.mask_token': id 60 is outside the vocabulary of 60 ids"):
        resolve_vocabulary(small_model(vocab_size=60), ids_alone)


def test_text_in_ids_outside_the_vocabulary_is_refused(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, "tokenizer.json")
    size = max(tokenizer.encode("Tom has 12 apples."))
    path = folder / "outside.jsonl"
    path.write_text(json.dumps({"prompt": "Tom has 12 apples.", "response": "a"}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"line 1: a token id is outside the vocabulary of {size} ids"):
        read_sft(str(path), tokenizer, settings(64), size)


def test_whole_numbers_are_single_tokens(folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    assert all(len(processor.encode(f"= {n}.")) == 3 for n in range(LARGEST + 1))


@pytest.mark.parametrize("name", ["sp.model", "tokenizer.json"])
def test_question_and_answer(folder: Path, name: str) -> None:
    tokenizer = tokenizer_of(folder, name)
    data = read_sft(str(folder / "test.jsonl"), tokenizer, settings(128, too_long="error"), tokenizer.num_ids)
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert len(data) == len(records) == 20
    for sample, record in zip(data.samples, records):
        assert sample.tokens[-1] == tokenizer.eos_id
        assert tokenizer.decode(sample.tokens[sample.eligible]).strip() == record["answer"]
        assert tokenizer.decode(sample.tokens[~sample.eligible]).strip() == record["question"]
    assert (data.num_eligible() > 0).all()


def test_empty_response_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "a", "response": ""}\n', encoding="utf-8")
    tokenizer = tokenizer_of(folder, "sp.model")
    with pytest.raises(UserError, match="line 3: no eligible token"):
        read_sft(str(path), tokenizer, settings(64), tokenizer.num_ids)


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    for name in ("broken.model", "broken.json"):
        (tmp_path / name).write_text("nothing", encoding="utf-8")
        with pytest.raises(UserError, match=rf"{name}: not a sentencepiece model or tokenizer.json"):
            tokenizer_of(tmp_path, name)


def test_split_is_disjoint_seeded_and_complete(tmp_path: Path) -> None:
    write_ids(tmp_path / "a.jsonl", 50)
    tokenizer = load_tokenizer(DataConfig(train="x", mask_token=60, pad_token=0, eos_token=1, max_length=64))
    data = read_sft(str(tmp_path / "a.jsonl"), tokenizer, settings(64), 61)
    train, validation = split_validation(data, 0.2, seed=1)
    assert (len(train), len(validation)) == (40, 10)
    everything = sorted(sample.tokens.tolist() for sample in [*train.samples, *validation.samples])
    assert everything == sorted(sample.tokens.tolist() for sample in data.samples)
    again = split_validation(data, 0.2, seed=1)[1]
    assert [a.tokens.tolist() for a in again.samples] == [b.tokens.tolist() for b in validation.samples]


def test_generated_problems_are_right_and_distinct(folder: Path) -> None:
    sets = [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation", "test")]
    problems = [json.loads(line) for lines in sets for line in lines]
    assert len({problem["question"] for problem in problems}) == 640
    comparisons = generate(300, 5, kind="comparisons")
    operators = Counter(problem["answer"].split()[1] for problem in comparisons)
    assert operators.keys() == {"max", "min"}
    assert min(operators.values()) > 90
    for problem in (*problems, *comparisons):
        first, second, final = problem["answer"].replace("####", "").rsplit(".", 2)
        for equation in (first, second):
            left, right = equation.split("=")
            a, operator, b = left.split()
            value = max(int(a), int(b)) if operator == "max" else min(int(a), int(b))
            assert int(right) == (value if operator in operators else eval(left.replace("/", "//")))
            assert 1 <= int(right) <= LARGEST
        assert extract_answer(problem["answer"]) == final.strip() == second.split("=")[1].strip()
    assert generate(5, 3) == generate(5, 3)
    lengths = np.array([len(problem["question"].split()) for problem in problems])
    assert lengths.std() > 2  # many templates, not one


def test_a_blend_shows_rows_as_its_weights_ask(tmp_path: Path) -> None:
    data = settings(64, mask_token=60, pad_token=0, eos_token=1)
    sets = [
        read_sft(str(write_ids(tmp_path / f"{size}.jsonl", size, seed=size)), load_tokenizer(data), data, 61)
        for size in (12, 5)
    ]
    both = blended(sets, [1.0, 0.5])
    rows = [tuple(sample.tokens) for sample in both.samples]
    many, few = ([tuple(sample.tokens) for sample in part.samples] for part in sets)
    assert rows == [*many, *few, few[0]]  # 12 and half as many
    assert len(joined(sets)) == 17
    assert both.fingerprint not in {part.fingerprint for part in sets}
    assert blended(sets[:1], [0.3]) is sets[0]
