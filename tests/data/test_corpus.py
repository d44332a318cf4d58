"""Corpora: written and read in Megatron's format, sampled, blended, resumed; and what is said of broken ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data import documents
from megatron_mdm.data.corpus import CorpusDataset, blend_counts, read_corpora
from megatron_mdm.data.corpus_writer import CorpusSettings, write_corpus
from megatron_mdm.data.documents import Source
from megatron_mdm.data.indexed import find_shards, open_shard
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.ranks import run_program_ranks


def write_with_megatron(prefix: Path, docs: list[list[int]], dtype: Any = np.uint16) -> list[list[int]]:
    """With megatron-core's own builder; every second document is made of two sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number, doc in enumerate(docs):
        middle = len(doc) // 2 if number % 2 else 0
        for part in (doc[:middle], doc[middle:]):
            if part:
                builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return docs


def some_documents(count: int, seed: int = 0, vocab_size: int = 200) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, generator.integers(1, 40)).tolist() for _ in range(count)]


def corpus(prefix: Path | dict[Path, float], **changes: Any) -> tuple[CorpusDataset, CorpusDataset | None]:
    blend = prefix if isinstance(prefix, dict) else {prefix: 1.0}
    settings: dict[str, Any] = {
        "length": 16,
        "vocab_size": 200,
        "tokenizer_path": "",
        "sees_across_documents": True,
        "random_length": 0.0,
        "validation_fraction": 0.0,
        "seed": 3,
        "skip_bad": False,
    }
    return read_corpora({str(name): weight for name, weight in blend.items()}, **{**settings, **changes})


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatrons_files_are_read_as_they_are(dtype: Any, tmp_path: Path) -> None:
    docs = write_with_megatron(tmp_path / "a", some_documents(50), dtype)
    shard = open_shard(str(tmp_path / "a"))
    assert [shard.read(number, 0, len(doc)).tolist() for number, doc in enumerate(docs)] == docs
    assert shard.read(3, 2, 1).tolist() == docs[3][2:3]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tokenizer, and the same 3000 paragraphs as text, JSON lines and parquet."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = ["sea", "ship", "ärger", "wind", "storm", "sail", "north", "日本", "of", "the"]
    paragraphs = [
        "\n".join(" ".join(generator.choices(words, k=9)) for _ in range(generator.randint(1, 4))) for _ in range(3000)
    ]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(paragraphs[:200], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "a.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs), encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": paragraphs}), folder / "a.parquet")
    data = DataConfig(train="", tokenizer=str(folder / "tokenizer.json"), max_length=2)
    return {"folder": folder, "paragraphs": paragraphs, "data": data, "tokenizer": load_tokenizer(data)}


def prepare(text: dict[str, Any], output: Path, path: Path, **changes: Any) -> Any:
    settings = CorpusSettings(str(output), text["data"], **changes)
    return write_corpus(Source([str(path)], documents.format_of(str(path))), settings)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_corpus(
    name: str, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by megatron-core: every document, its boundary and its end token; counts are exact; several shards."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)
    result = prepare(text, tmp_path / "c", text["folder"] / name, shard_tokens=20_000)
    tokenizer = text["tokenizer"]
    expected = [[*tokenizer.encode(p.rstrip("\n")), tokenizer.eos_id] for p in text["paragraphs"]]
    found: list[list[int]] = []
    shards = find_shards(str(tmp_path / "c"))
    for prefix in shards:
        dataset = IndexedDataset(prefix)
        found += [dataset[index].tolist() for index in range(len(dataset))]
    found[-1] = found[-1] if name != "a.txt" else expected[-1]  # the file's last line break
    assert found == expected
    assert len(shards) == result.shards > 1
    assert result.documents == (3000,)
    assert abs(sum(map(len, expected)) - result.tokens[0]) <= 1


def test_an_interrupted_preparation_goes_on(
    text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a later shard, it ends with the same files as one that was not."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)
    settings = {"shard_tokens": 20_000, "shares": (0.8, 0.15, 0.05)}
    whole = prepare(text, tmp_path / "whole", text["folder"] / "a.txt", **settings)
    broken = tmp_path / "a.txt"
    content = (text["folder"] / "a.txt").read_bytes()
    cut = len(content) * 2 // 3
    broken.write_bytes(content[:cut] + b"\xff\xfe" + content[cut + 2 :])
    with pytest.raises(UserError, match=r"a\.txt, line \d+: not UTF-8 \(byte 0xff"):
        prepare(text, tmp_path / "again", broken, **settings)
    done = json.loads((tmp_path / "again.progress.json").read_text())
    assert 0 < done["shards"] < whole.shards
    broken.write_bytes(content)
    again = prepare(text, tmp_path / "again", broken, **settings)
    assert (again.documents, again.tokens, again.shards) == (whole.documents, whole.tokens, whole.shards)
    for file in tmp_path.glob("whole-*-000*"):
        assert (tmp_path / file.name.replace("whole", "again")).read_bytes() == file.read_bytes()
    assert np.allclose(np.array(whole.documents) / 3000, settings["shares"], atol=0.03)
    with pytest.raises(UserError, match="another 'shard_tokens'"):
        prepare(text, tmp_path / "again", broken, **{**settings, "shard_tokens": 30_000})


def test_the_program_with_two_processes(text: dict[str, Any], tmp_path: Path) -> None:
    """Tokenising in worker processes gives the same bytes as in this one."""
    path = text["folder"] / "a.jsonl"
    arguments = ["corpus", str(path), "--output", str(tmp_path / "two"), "--tokenizer", text["data"].tokenizer]
    result = run_program_ranks("tools/prepare_data.py", [*arguments, "--workers", "2"])[0]
    assert result.exit_code == 0, result.stderr
    assert "3,000 documents" in result.stdout
    prepare(text, tmp_path / "one", path)
    assert (tmp_path / "two-00000.bin").read_bytes() == (tmp_path / "one-00000.bin").read_bytes()


def test_every_token_is_in_one_sequence(tmp_path: Path) -> None:
    docs = write_with_megatron(tmp_path / "a", some_documents(60))
    data, _ = corpus(tmp_path / "a")
    assert len(data) == -(-sum(map(len, docs)) // 16)
    stream = np.concatenate([sample.tokens for sample in data.samples])
    joined = [doc for number in data.corpora[0].documents for doc in docs[number]]
    assert stream.tolist() == joined
    assert data.lengths().tolist() == [len(sample.tokens) for sample in data.samples]
    assert sorted(data.corpora[0].documents) == list(range(60))
    again, _ = corpus(tmp_path / "a")
    assert np.array_equal(again.samples[3].tokens, data.samples[3].tokens)
    other, _ = corpus(tmp_path / "a", seed=4)
    assert not np.array_equal(other.corpora[0].documents, data.corpora[0].documents)


def test_documents_are_segments_where_they_shall_not_see_each_other(tmp_path: Path) -> None:
    docs = write_with_megatron(tmp_path / "a", some_documents(60))
    data, _ = corpus(tmp_path / "a", sees_across_documents=False)
    parts = [part for sample in data.samples for part in (sample.segments if len(sample.segments) else [16])]
    assert sum(map(len, docs)) == sum(sample.segments.sum() or len(sample.tokens) for sample in data.samples)
    assert max(parts) <= 16
    ends = np.cumsum([len(docs[number]) for number in data.corpora[0].documents])
    inner = np.cumsum(data.samples[0].segments)[:-1]
    assert inner.tolist() == ends[: len(inner)].tolist()


def test_random_lengths(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "a", some_documents(2000))
    plain, _ = corpus(tmp_path / "a")
    data, _ = corpus(tmp_path / "a", random_length=0.25)
    shorter = data.lengths() < plain.lengths()
    share, size = 0.25 * 15 / 16, len(data)  # one length in 16 changes nothing
    assert abs(shorter.mean() - share) < 4 * np.sqrt(share * (1 - share) / size)
    row = int(np.flatnonzero(shorter)[0])
    assert data.samples[row].tokens.tolist() == plain.samples[row].tokens[: data.lengths()[row]].tolist()


def test_blend(tmp_path: Path) -> None:
    assert blend_counts([100, 50], [3, 1]).tolist() == [150, 50]
    write_with_megatron(tmp_path / "a", some_documents(60))
    write_with_megatron(tmp_path / "b", some_documents(20, seed=1))
    data, _ = corpus({tmp_path / "a": 0.25, tmp_path / "b": 0.75})
    a, b = (len(part) for part in data.corpora)
    assert data.counts.tolist() == [a, 3 * a]
    assert data.samples[a].tokens.tolist() == data.samples[a + b].tokens.tolist()  # b again
    train, validation = corpus({tmp_path / "a": 1.0, tmp_path / "b": 1.0}, validation_fraction=0.2)
    assert validation is not None
    for kept, held_out in zip(train.corpora, validation.corpora):
        assert not set(kept.documents) & set(held_out.documents)


BREAKAGES = {
    "truncated bin": (".bin", lambda data: data[:-100], r"a\.bin: truncated .* document \d+ of 50 is the first"),
    "idx of another bin": (".bin", lambda data: data + b"\0\0", r"a\.idx does not fit its \.bin: it describes"),
    "no index": (".idx", lambda data: b"something else" * 9, r"a\.idx: not an index of Megatron's"),
    "truncated idx": (".idx", lambda data: data[:-9], r"a\.idx: truncated or damaged: [\d,]+ bytes"),
    "empty bin": (".bin", lambda data: b"", r"a\.bin: is empty"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_corpora(name: str, tmp_path: Path) -> None:
    """One line with the place; skipped and counted where that is asked for and something is left."""
    suffix, damage, message = BREAKAGES[name]
    write_with_megatron(tmp_path / "b", some_documents(5))
    docs = write_with_megatron(tmp_path / "a", some_documents(50))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        corpus(tmp_path / "a")
    assert "\n" not in str(error.value)
    if name == "truncated bin":
        data, _ = corpus(tmp_path / "a", skip_bad=True)
        readable = int(open_shard(str(tmp_path / "a"), allow_truncated=True).readable.sum())
        assert data.num_bad == 50 - readable > 0
        assert sorted(data.corpora[0].documents) == list(range(readable))
        assert sum(len(sample.tokens) for sample in data.samples) == sum(map(len, docs[:readable]))
    else:
        with pytest.raises(UserError, match="the corpus is empty"):
            corpus(tmp_path / "a", skip_bad=True)


def test_a_damaged_shard_is_skipped(tmp_path: Path) -> None:
    for number in range(3):
        write_with_megatron(tmp_path / f"a-{number:05d}", some_documents(9, seed=number))
    path = tmp_path / "a-00001.idx"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a-00001\.idx: truncated"):
        corpus(tmp_path / "a")
    data, _ = corpus(tmp_path / "a", skip_bad=True)
    assert data.num_bad == 1
    assert len(data.corpora[0].documents) == 18


def test_empty_and_missing_corpora(text: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus here"):
        corpus(tmp_path / "nothing")
    (tmp_path / "empty.txt").write_text("\n\n\n")
    with pytest.raises(UserError, match=r"empty\.txt: no documents"):
        prepare(text, tmp_path / "c", tmp_path / "empty.txt")


def test_a_tokenizer_of_another_vocabulary(text: dict[str, Any], tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "a", some_documents(20, vocab_size=300))
    with pytest.raises(UserError, match=r"a\.bin, document \d+: token id \d+ is outside the vocabulary of 200 ids"):
        corpus(tmp_path / "a")
    prepare(text, tmp_path / "c", text["folder"] / "a.txt")
    other = tmp_path / "tokenizer.json"
    other.write_text(Path(text["data"].tokenizer).read_text() + "\n")
    with pytest.raises(UserError, match="made with another tokenizer"):
        corpus(tmp_path / "c", tokenizer_path=str(other), vocab_size=400)


def test_one_bad_line_among_many(text: dict[str, Any], tmp_path: Path) -> None:
    """Its number is named; skipped, it is counted and shown."""
    lines = [json.dumps({"text": "the sea"})] * 20_000
    lines[17_776] = '{"text": "the sea'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 17777: not valid JSON .* --on-error skip"):
        prepare(text, tmp_path / "stopped", path)
    result = prepare(text, tmp_path / "skipped", path, skip_bad=True)
    assert (result.bad, result.documents) == (1, (19_999,))
    assert result.first_bad[0].startswith(f"{path}, line 17777: not valid JSON")
