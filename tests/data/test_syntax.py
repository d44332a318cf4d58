"""Delimiters and syntax are found wherever the tokenizer cuts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig, IsadConfig, SyrmConfig
from megatron_mdm.data.sft import Sample, SftDataset, read_sft
from megatron_mdm.data.syntax import add_syntax, finder, mark_delimiters
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer

ROWS = [
    {"prompt": "| city | size |\n| Bonn | 3 |\nHow large is Bonn?", "response": "It is 3. #### 3"},
    {"prompt": "<table><tr><td>4</td></tr></table> Sum?", "response": "4 #### 4"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level pieces that cut through the texts that are looked for."""
    path = tmp_path_factory.mktemp("syntax") / "tokenizer.json"
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator([text for row in ROWS for text in row.values()] * 20, trainer)
    pieces.save(str(path))
    return load_tokenizer(DataConfig(train="x", tokenizer=str(path), max_length=200))


@pytest.fixture
def data(tokenizer: Tokenizer, tmp_path: Path) -> SftDataset:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return read_sft(str(path), tokenizer, DataConfig(train="x", max_length=200, too_long="error"), tokenizer.num_ids)


def texts(sample: Sample, places: np.ndarray, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.pieces(sample.tokens[places].tolist()))


def test_pieces_put_together_are_the_text(tokenizer: Tokenizer, data: SftDataset) -> None:
    for sample, row in zip(data.samples, ROWS):
        assert "".join(tokenizer.pieces(sample.tokens.tolist())) == row["prompt"] + "\n" + row["response"]


def test_delimiters_are_marked_in_the_response(tokenizer: Tokenizer, data: SftDataset) -> None:
    marked = mark_delimiters(data, IsadConfig(delimiters=("####",)), tokenizer)
    for sample in marked.samples:
        assert "####" in texts(sample, sample.delimiters, tokenizer)
        assert not (sample.delimiters & ~sample.eligible).any()
    assert marked.num_delimiters().min() >= 1
    assert (marked.num_eligible() == data.num_eligible()).all()


def test_token_ids_are_delimiters_as_they_are(tokenizer: Tokenizer, data: SftDataset) -> None:
    token = int(data.samples[0].tokens[-2])
    marked = mark_delimiters(data, IsadConfig(delimiters=(token,)), tokenizer)
    assert (marked.samples[0].tokens[marked.samples[0].delimiters] == token).all()


def test_table_syntax_of_the_prompt_becomes_eligible(tokenizer: Tokenizer, data: SftDataset) -> None:
    piped = add_syntax(data, SyrmConfig(preset="pipe_table"), tokenizer)
    added = piped.samples[0].eligible & ~data.samples[0].eligible
    assert texts(piped.samples[0], added, tokenizer).count("|") == 6
    assert piped.samples[1].eligible.tolist() == data.samples[1].eligible.tolist()
    html = add_syntax(data, SyrmConfig(preset="html_table"), tokenizer)
    added = html.samples[1].eligible & ~data.samples[1].eligible
    assert "<table><tr><td>" in texts(html.samples[1], added, tokenizer)
    own = add_syntax(data, SyrmConfig(tokens=("large",)), tokenizer)
    assert own.num_eligible()[0] > data.num_eligible()[0]


def test_what_finds_nothing_is_refused(tokenizer: Tokenizer, data: SftDataset) -> None:
    with pytest.raises(UserError, match=r"isad\.delimiters.*none of them"):
        mark_delimiters(data, IsadConfig(delimiters=("@@",)), tokenizer)
    with pytest.raises(UserError, match=r"syrm.*none of its tokens"):
        add_syntax(data, SyrmConfig(tokens=("@@",)), tokenizer)
    everything = data.with_samples([sample._replace(eligible=np.ones_like(sample.eligible)) for sample in data.samples])
    with pytest.raises(UserError, match=r"syrm.*no prompt"):
        add_syntax(everything, SyrmConfig(preset="pipe_table"), tokenizer)


def test_nothing_to_look_for_finds_nothing(tokenizer: Tokenizer, data: SftDataset) -> None:
    assert not finder((), "", tokenizer)(data.samples[0].tokens).any()
