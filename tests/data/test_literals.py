"""Special tokens' texts in the data: they are text, or are refused by line; only a template writes control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.conversation import Message
from megatron_mdm.data.documents import Chunk, Position
from megatron_mdm.data.encode import Settings, encode_all
from megatron_mdm.data.literals import MARK
from megatron_mdm.data.sft import SftDataset, encode_prompt, read_sft
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.test_tokenizer_files import byte_level, sentencepiece_model

__all__ = ["sentencepiece_model"]  # a fixture
LLADA = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL = ("<mask>", "<pad>", "</s>", *LLADA)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
# Alone, at the ends, one within another's beginning, twice, and as parts of words.
CONTENTS = [f"{token}" for token in SPECIAL]
CONTENTS += [
    "What does <mask> do? </s> ok",
    "<<mask>>",
    "x<mask",
    "a<|eot_id|><|eot_id|>b",
    "<|start_<|eot_id|>header_id|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("literals")
    model = byte_level()
    model.add_special_tokens(list(LLADA))
    model.add_tokens(["<think>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


def load(path: Path, **changes: Any) -> Tokenizer:
    return load_tokenizer(DataConfig(train="", tokenizer=str(path), max_length=400, **changes))


def read(folder: Path, path: Path, records: list[dict[str, Any]], **changes: Any) -> tuple[SftDataset, Tokenizer]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(train="", tokenizer=str(folder), max_length=400, **changes)
    tokenizer = load_tokenizer(data)
    return read_sft(str(path), tokenizer, data, tokenizer.num_ids), tokenizer


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {special.id for special in tokenizer.backend.special.values()}


@pytest.mark.parametrize("text", CONTENTS)
def test_a_text_is_text(text: str, folder: Path) -> None:
    tokenizer = load(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.encode_batch([text, "a"])[0] == ids
    assert not special_ids(tokenizer) & set(ids)
    assert tokenizer.backend.decode(ids) == text


@pytest.mark.parametrize("template", ["plain", "llada", "tokenizer"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_conversation_has_the_control_tokens_of_its_template(
    content: str, template: str, folder: Path, tmp_path: Path
) -> None:
    """Those that the same conversation with a harmless text has, in the same places; the text is whole."""
    data, tokenizer = read(folder, tmp_path / "a.jsonl", [{"prompt": content, "response": content}], template=template)
    other, _ = read(folder, tmp_path / "b.jsonl", [{"prompt": "Q", "response": "Q"}], template=template)
    control = special_ids(tokenizer)

    def control_of(tokens: Any) -> list[int]:
        return [int(token) for token in tokens if int(token) in control]

    sample = data.samples[0]
    harmless = other.samples[0]
    assert control_of(sample.tokens) == control_of(harmless.tokens)
    assert control_of(sample.tokens[sample.eligible]) == control_of(harmless.tokens[harmless.eligible])
    text = tokenizer.backend.tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
    expected = tokenizer.backend.tokenizer.decode(harmless.tokens.tolist(), skip_special_tokens=False)
    assert text == expected.replace("Q", content)
    assert encode_prompt(content, tokenizer) == sample.tokens[~sample.eligible].tolist()
    assert tokenizer.decode(sample.tokens[sample.eligible]) == content


def test_a_text_without_special_tokens_is_encoded_as_before(folder: Path) -> None:
    tokenizer = load(folder, template="tokenizer")
    (pieces,) = tokenizer.samples_of([Message("user", "Don't  panic"), Message("assistant", "No.")], last_only=False)
    texts = [piece.text for piece in pieces]
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode_pieces(texts) == [library.encode(text).ids for text in texts]
    assert not any(MARK in text for text in texts)


def test_marked_texts_are_encoded_as_the_library_would(folder: Path) -> None:
    """Beside control tokens that swallow white space, too."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(
        [tokenizers.AddedToken("<|l|>", lstrip=True), tokenizers.AddedToken("<|r|>", rstrip=True)]
    )
    path = folder / "strip.json"
    library.save(str(path))
    tokenizer = load(path)
    for text in ("a <|l|> b", "a <|r|>  b", "a <|r|> <|l|> b", "<|eot_id|>  <|l|>", "x<think>y <|eot_id|>"):
        marked = f"{text} {tokenizer.literals.mark('<mask>')}"
        assert tokenizer.encode_pieces([marked])[0][: -len(tokenizer.encode(" <mask>"))] == library.encode(text).ids
        assert tokenizer.encode_pieces([marked])[0][-len(tokenizer.encode(" <mask>")) :] == tokenizer.encode(" <mask>")


def test_a_token_that_is_not_special_stays_a_token(folder: Path) -> None:
    """As with transformers: <think> in an answer is what the model is to write."""
    tokenizer = load(folder)
    assert tokenizer.backend.token_id("<think>") in tokenizer.encode("<think>so</think>")


def unigram(path: Path) -> Path:
    """A vocabulary with a special token as one of its pieces, as T5's and XLM-R's: its text always becomes its id."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "abs </>")]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    model.add_special_tokens(["<mask>", "</s>"])
    model.save(str(path))
    return path


def normalised(path: Path) -> Path:
    """Special tokens are looked for in lower-cased text."""
    model = byte_level()
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.add_special_tokens([tokenizers.AddedToken("[mask]", normalized=True, special=True)])
    model.save(str(path))
    return path


def refused(tokenizer_path: Path, content: str, named: str, tmp_path: Path, **changes: Any) -> None:
    record = {"prompt": "a", "response": "b"}
    records = [record, {"prompt": content, "response": "b"}, {"prompt": "a", "response": content}, record]
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: the text holds '{named}', which the tokenizer takes"):
        read(tokenizer_path, tmp_path / "a.jsonl", records, **changes)
    data, tokenizer = read(tokenizer_path, tmp_path / "a.jsonl", records, on_error="skip", **changes)
    assert (len(data), data.num_bad) == (2, 2)
    for use in (tokenizer.encode, lambda text: encode_prompt(text, tokenizer)):
        with pytest.raises(UserError, match=named):
            use(content)


def test_what_cannot_be_text_is_refused_by_line(sentencepiece_model: Path, tmp_path: Path) -> None:
    refused(unigram(tmp_path / "unigram.json"), "ab</s>", "</s>", tmp_path)
    refused(sentencepiece_model, "a <mask>", "<mask>", tmp_path)


def test_a_mask_token_that_is_an_ordinary_word_is_refused_in_a_text(folder: Path) -> None:
    tokenizer = load(folder, mask_token="a")
    with pytest.raises(UserError, match="the text holds 'a', which the tokenizer takes for its special token"):
        tokenizer.encode("a word")
    assert tokenizer.encode("the")


def test_documents_of_a_corpus_are_text(folder: Path, sentencepiece_model: Path) -> None:
    documents = ["a text", "a <mask> text </s>"]
    chunk = Chunk(documents, "c.jsonl", ["line 1", "line 2"], [], "value", 2, Position())
    for path, num_bad in ((folder, 0), (sentencepiece_model, 1)):  # the latter cannot write <mask> as text
        data = DataConfig(train="", tokenizer=str(path), max_length=9)
        tokenizer = load_tokenizer(data)
        (encoded,) = encode_all([chunk], Settings(data, "text", True, "int32"), 1)
        assert encoded.num_bad == num_bad
        assert len(encoded.lengths) == 2 - num_bad
        assert np.isin(encoded.tokens, [tokenizer.mask_id, tokenizer.eos_id]).sum() == len(encoded.lengths)  # ends
        if num_bad:
            assert encoded.first_bad[0].startswith("c.jsonl, line 2: the text holds '<mask>'")


def test_control_symbols_of_sentencepiece_are_text_in_a_text(sentencepiece_model: Path) -> None:
    tokenizer = load(sentencepiece_model)
    control = tokenizer.backend.token_id("<ctl>")
    assert control not in tokenizer.encode("a<ctl>b")
    assert tokenizer.encode_pieces(["<ctl>a", f"{tokenizer.literals.mark('<ctl>')}a"]) == [
        [control, *tokenizer.encode("a")],
        tokenizer.encode("<ctl>a"),
    ]


def test_special_tokens_in_normalised_text(tmp_path: Path) -> None:
    tokenizer = load(normalised(tmp_path / "lower.json"), mask_token="[mask]")
    assert tokenizer.mask_id not in tokenizer.encode("a [mask] b")
    assert tokenizer.mask_id not in tokenizer.encode("a [MASK] b")
    assert tokenizer.mask_id not in encode_prompt("a [MASK] b", tokenizer)


def test_the_mask_token_in_clean_ids_is_named(folder: Path, tmp_path: Path) -> None:
    mask = load(folder).mask_id
    records: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "prompt_length": 1},
        {"input_ids": [5, mask, 7], "prompt_length": 2},
    ]
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: token 1 is the mask token {mask}"):
        read(folder, tmp_path / "a.jsonl", records)
    data, _ = read(folder, tmp_path / "a.jsonl", records, on_error="skip")
    assert (len(data), data.num_bad) == (1, 1)
    assert not np.isin(mask, data.samples[0].tokens)


def test_tokens_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    model = byte_level()
    names = ["<a>", "<a>b", "<ab>", "[x", "[x]", *(f"<|reserved_{number}|>" for number in range(300))]
    model.add_special_tokens(names)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    text = "<a>b<a><ab>[x][x<|reserved_1|><|reserved_12|><|reserved_<|reserved_2|>"
    (whole,) = tokenizer.encode_pieces([text])
    assert tokenizer.encode_pieces([f"{text}{tokenizer.literals.mark('<a>')}"]) == [whole + tokenizer.encode("<a>")]
    assert not special_ids(tokenizer) & set(tokenizer.encode_pieces([tokenizer.literals.mark(text)])[0])


def test_the_text_of_the_unknown_token_is_text(tmp_path: Path) -> None:
    """And what the vocabulary lacks is still the unknown token."""
    alphabet = {letter: place for place, letter in enumerate("<unk>ab", 1) if letter != "u"}
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, **alphabet}, [], unk_token="<unk>"))
    model.add_special_tokens(["<unk>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    expected = [alphabet["a"], alphabet["<"], 0, *(alphabet[letter] for letter in "nk>b")]
    assert tokenizer.encode("a<unk>b") == expected
    assert tokenizer.encode_pieces([tokenizer.literals.mark("a<unk>b")]) == [expected]
    assert tokenizer.encode_pieces(["a<unk>b"]) == [[alphabet["a"], 0, alphabet["b"]]]


def test_a_content_with_the_mark_itself_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: holds the noncharacter U\+FDD0"):
        read(folder, tmp_path / "a.jsonl", [{"prompt": f"a{MARK}", "response": "b"}])
