"""Corpora: written and read in Megatron's format, sampled, blended, resumed; and what is said of broken ones."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data import documents, indexed
from megatron_mdm.data.corpus import CorpusDataset, blend_counts, read_corpora
from megatron_mdm.data.corpus_writer import CorpusSettings, warnings, write_corpus
from megatron_mdm.data.documents import Source
from megatron_mdm.data.indexed import find_shards, open_shard
from megatron_mdm.data.splits import read_splits
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.disk import Disk
from tests.ranks import run_program_ranks
from tests.small import small_config


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
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2") as error:
        prepare(text, tmp_path / "bad", bad, workers=2)
    assert not multiprocessing.active_children()  # they would keep a pipe open for ever
    assert error.traceback  # which is what a program still has when it ends


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
    ends = set(np.cumsum([len(docs[number]) for number in data.corpora[0].documents]).tolist())
    sizes = data.lengths()
    cuts = set(np.cumsum(sizes).tolist())  # of sequences
    found = set[int]()
    numbers = set[int]()
    for first, sample in zip(np.cumsum(sizes) - sizes, data.samples):
        parts = sample.segments if len(sample.segments) else np.array([len(sample.tokens)])
        assert parts.sum() == len(sample.tokens)
        found |= set((first + np.cumsum(parts)).tolist())
        numbers.add(len(parts))
        assert sample.eligible.all()  # the first of a sequence and of a document, too
    assert found == ends | cuts  # no two documents share a segment, none is cut but where its sequence ends
    assert {1, 2, 3} <= numbers
    together, _ = corpus(tmp_path / "a")
    assert not any(len(sample.segments) for sample in together.samples)


def test_random_lengths(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "a", some_documents(2000))
    plain, _ = corpus(tmp_path / "a")
    data, _ = corpus(tmp_path / "a", random_length=0.25)
    shorter = data.lengths() < plain.lengths()
    # one length in 16 changes nothing
    share = 0.25 * 15 / 16
    size = len(data)
    assert abs(shorter.mean() - share) < 4 * np.sqrt(share * (1 - share) / size)
    row = int(np.flatnonzero(shorter)[0])
    assert data.samples[row].tokens.tolist() == plain.samples[row].tokens[: data.lengths()[row]].tolist()


def test_random_lengths_are_of_any_size(tmp_path: Path) -> None:
    """U{1 … length}, the whole length included."""
    write_with_megatron(tmp_path / "a", some_documents(500))
    data, _ = corpus(tmp_path / "a", random_length=1.0, length=4)
    counts = np.bincount(data.lengths()[:-1])[1:]
    assert np.abs(counts / counts.sum() - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / counts.sum())


def test_a_small_corpus_has_a_document_for_validation(tmp_path: Path) -> None:
    docs = write_with_megatron(tmp_path / "a", some_documents(20))
    train, validation = corpus(tmp_path / "a", validation_fraction=0.001)
    assert validation is not None
    (number,) = validation.corpora[0].documents
    assert sum(validation.lengths()) == len(docs[number])
    assert len(train.corpora[0].documents) == 19


def test_held_out_sequences_are_whole(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "a", some_documents(60))
    _, validation = corpus(tmp_path / "a", random_length=1.0, validation_fraction=0.5)
    assert validation is not None
    assert (validation.lengths()[:-1] == 16).all()
    data = {"train": str(tmp_path / "a"), "validation": str(tmp_path / "a"), "format": "corpus", "max_length": 16}
    config = small_config(tmp_path, data={**data, "random_length": 1.0}, model={"vocab_size": 200})
    ids = load_tokenizer(config.data)
    train, validation = read_splits(config, ids)
    assert isinstance(train, CorpusDataset)
    assert (train.lengths() < 16).sum() > len(train) / 2
    assert validation is not None
    assert (validation.lengths()[:-1] == 16).all()


def test_ids_behind_those_that_are_checked_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused when they are read; the greatest id is the vocabulary's size − 1."""
    monkeypatch.setattr(indexed, "_CHECKED_TOKENS", 1)
    write_with_megatron(tmp_path / "a", [[5, 199, 7], [5, 200, 7]])
    data, _ = corpus(tmp_path / "a", length=3, vocab_size=201)
    assert sorted(max(sample.tokens.tolist()) for sample in data.samples) == [199, 200]
    data, _ = corpus(tmp_path / "a", length=3)
    with pytest.raises(UserError, match=r"a\.bin, document 1: a token id is outside the vocabulary of 200 ids"):
        list(data.samples)


def test_blend(tmp_path: Path) -> None:
    assert blend_counts([100, 50], [3, 1]).tolist() == [150, 50]
    assert blend_counts([7, 5, 3], [0.4, 0.4, 0.2]).tolist() == [7, 7, 4]  # half a row more, not less
    for sizes in ([10, 7], [33, 1], [3, 11, 29]):  # every sequence of the one that lasts longest, whatever is rounded
        weights = [size * 0.1 for size in sizes]
        assert blend_counts(sizes, weights).tolist() == sizes
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
    "idx with more behind it": (".idx", lambda data: data + b"1234567", r"a\.idx: truncated or damaged: [\d,]+ bytes"),
    "documents of other sequences": (
        ".idx",
        lambda data: data[:-8] + (999).to_bytes(8, "little"),
        r"a\.idx: its documents do not match its [\d,]+ sequences",
    ),
    "first document behind the beginning": (
        ".idx",
        lambda data: data[: -51 * 8] + (1).to_bytes(8, "little") + data[-50 * 8 :],
        r"a\.idx: its documents do not match its [\d,]+ sequences",
    ),
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


def documents_of(prefix: Path, tokenizer: Any) -> list[str]:
    """The documents as text, without end tokens."""
    found = []
    for shard in map(open_shard, find_shards(str(prefix))):
        for number, length in enumerate(shard.lengths):
            ids = shard.read(number, 0, int(length)).tolist()
            assert ids[-1] == tokenizer.eos_id
            found.append(tokenizer.decode(ids[:-1]))
    return found


BLANK = ["", " ", "\t ", "\u3000", "\u00a0\u2003", "\x0b\x0c"]  # of which WikiText has the second


@pytest.mark.parametrize("chunk_bytes", [37, 1 << 20])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_documents_of_a_text_end_at_blank_lines(
    line_end: str, chunk_bytes: int, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank lines are of white space of any kind, in any number, on any system; wherever a block of the file ends."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
    paragraphs = [f" = {number} = \nthe sea\u2028 of \n storms {'x' * (number % 29)}" for number in range(200)]
    content = BLANK[1] + "\n"  # WikiText begins with such a line
    for number, paragraph in enumerate(paragraphs):
        gap = "\n".join(BLANK[(number + extra) % len(BLANK)] for extra in range(1 + number % 3))
        content += f"{paragraph}\n{gap}\n"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", line_end).encode())
    prepare(text, tmp_path / "c", path)
    assert documents_of(tmp_path / "c", text["tokenizer"]) == paragraphs
    result = write_corpus(
        Source([str(path)], "text", separator="line"), CorpusSettings(str(tmp_path / "lines"), text["data"])
    )
    assert result.documents == (600,)  # blank lines are none
    assert documents_of(tmp_path / "lines", text["tokenizer"])[:2] == paragraphs[0].split("\n")[:2]


def test_white_space_is_pythons() -> None:
    spaces = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace() and chr(code) not in "\r\n"]
    assert all(re.fullmatch(documents._SPACE, space.encode()) for space in spaces)
    others = [chr(code) for code in [*range(0x3100), 0xFEFF] if not chr(code).isspace()]
    assert not any(re.fullmatch(documents._SPACE, other.encode()) for other in others)


def test_lines_of_bad_documents_are_counted(text: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for line_end in (b"\n", b"\r\n", b"\r"):
        path.write_bytes(line_end.join([b"a", b"b", b" ", b"", b"c", b"", b"d", b"\xff", b"", b"e"]))
        with pytest.raises(UserError, match=r"a\.txt, line 7: not UTF-8 \(byte 0xff"):
            prepare(text, tmp_path / "c", path)


@pytest.mark.parametrize("layout", ["array", "objects over lines", "compressed lines", "compressed text"])
def test_other_layouts_give_the_same_corpus(
    layout: str, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several shards; stopped at a bad record and resumed, too."""
    import gzip

    monkeypatch.setattr(documents, "_ROWS", 50)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2_000)
    records = [{"text": paragraph} for paragraph in text["paragraphs"][:400]]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    name, content = {
        "array": ("a.json", json.dumps(records, indent=1).encode()),
        "objects over lines": ("a.json", "\n".join(json.dumps(record, indent=1) for record in records).encode()),
        "compressed lines": ("a.jsonl.gz", gzip.compress(lines)),
        "compressed text": ("a.txt.gz", gzip.compress("\n\n".join(text["paragraphs"][:400]).encode())),
    }[layout]
    expected = text["paragraphs"][:400]
    path = tmp_path / name
    path.write_bytes(content)
    prepare(text, tmp_path / "c", path, shard_tokens=4_000)
    assert documents_of(tmp_path / "c", text["tokenizer"]) == expected
    if layout != "array":
        return
    path.write_bytes(json.dumps([*records[:300], {"text": 3}, *records[300:]], indent=1).encode())
    with pytest.raises(UserError, match=r"a\.json, line 902: expected a string in the field 'text'"):
        prepare(text, tmp_path / "d", path, shard_tokens=4_000)
    path.write_bytes(content)
    prepare(text, tmp_path / "d", path, shard_tokens=4_000)
    assert documents_of(tmp_path / "d", text["tokenizer"]) == expected


BAD_DOCUMENTS = {
    "half a surrogate pair": ('{"text": "cut \\ud83d"}', "half of a surrogate pair"),
    "nested deeply": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "number": ('{"text": 3}', "expected a string in the field 'text', found int"),
    "null": ('{"text": null}', "expected a string in the field 'text', found NoneType"),
    "other fields": ('{"content": "a"}', "found content"),
    "a string": ('"text"', "expected an object, found str"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_bad_document_costs_itself_only(name: str, text: dict[str, Any], tmp_path: Path) -> None:
    line, message = BAD_DOCUMENTS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "the sea"}}\n{line}\n{{"text": "of wind"}}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{message}.*--on-error skip"):
        prepare(text, tmp_path / "c", path)
    result = prepare(text, tmp_path / "d", path, skip_bad=True)
    assert (result.bad, result.documents) == (1, (2,))
    assert documents_of(tmp_path / "d", text["tokenizer"]) == ["the sea", "of wind"]


def test_a_text_of_one_document_is_warned_of(text: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path, content in zip(paths, ("the\nsea\n", "of\n\nthe", "wind")):
        path.write_text(content)
    source = Source([str(path) for path in paths], "text")
    settings = CorpusSettings(str(tmp_path / "c"), text["data"])
    result = write_corpus(source, settings)
    (line,) = warnings(result, source)
    assert line.startswith(f"{paths[0]} and 1 other files: a single document each")
    assert warnings(write_corpus(source, settings), source) == [line]  # finished already
    lines = Source(source.paths[:2], "text", separator="line")
    assert not warnings(write_corpus(lines, replace(settings, output=str(tmp_path / "d"))), lines)


def test_a_split_without_documents_is_no_corpus(text: dict[str, Any], tmp_path: Path) -> None:
    """It is an error where it was asked for; else it has no files, which megatron-core could not map."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(text["paragraphs"][:8]))
    for shares in ((0.0, 0.0), (0.5, -0.5, 1.0), (0.4, 0.2, 0.2, 0.2)):
        with pytest.raises(UserError, match="--splits: give shares of train, validation, test"):
            prepare(text, tmp_path / "c", path, shares=shares)
    with pytest.raises(UserError, match=r"--splits: none of the 8 documents falls to validation \(0.001\).*--seed"):
        prepare(text, tmp_path / "c", path, shares=(0.999, 0.001), seed=1)
    result = prepare(text, tmp_path / "c", path, shares=(0.5, 0.5, 0.0), seed=1)  # another share: nothing is in the way
    assert min(result.documents[:2]) > result.documents[2] == 0
    assert [path.name for path in sorted(tmp_path.glob("c-*.bin*"))] == ["c-train-00000.bin", "c-validation-00000.bin"]
    assert not list(tmp_path.glob("c-*.idx.tmp"))


def test_a_split_may_be_empty_in_a_shard(text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)
    with Disk() as disk:
        result = prepare(text, tmp_path / "c", text["folder"] / "a.txt", shares=(0.99, 0.01), shard_tokens=1)
    assert not disk.too_early
    shards = find_shards(str(tmp_path / "c-validation"))
    assert 0 < len(shards) < result.shards
    data, _ = corpus(tmp_path / "c-validation", vocab_size=300)
    assert len(data.corpora[0].documents) == result.documents[1]


def test_a_tokenizer_is_trained_on_text(tmp_path: Path) -> None:
    """Or on texts in a column, as on samples."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(["sea", "ship", "wind", "storm"], k=9)) for _ in range(200)]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    models = []
    for name in ("a.txt", "a.jsonl"):
        output = tmp_path / f"{name}.model"
        arguments = ["--data", str(tmp_path / name), "--output", str(output), "--vocab-size", "60"]
        result = run_program_ranks("tools/train_tokenizer.py", arguments)[0]
        assert result.exit_code == 0, result.stderr
        models.append(load_tokenizer(DataConfig(train="", tokenizer=str(output), max_length=2)))
    assert models[0].encode(lines[0]) == models[1].encode(lines[0])
    assert models[0].decode(models[0].encode(lines[0])) == lines[0]
