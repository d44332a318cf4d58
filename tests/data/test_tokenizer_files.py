"""Tokenizer files: what they store beside a vocabulary, ids with gaps, tokens added beside them, vocab.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer, resolve_vocabulary
from tests.small import small_model

LONG = "tokens of a long text, " * 30
SHORT = "short"
TEXTS = ["Don't  panic!\n\n  12345 tokens,\ttabs; ", "naïve café — “quotes” 東京 🙂", " é é", "a\r\nb", ""]
Change = Callable[[tokenizers.Tokenizer], None]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with merges, and special tokens at the vocabulary's end."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([LONG, *TEXTS] * 3, trainer)
    model.add_special_tokens(["<pad>", "</s>", "<mask>"])
    return model


def load(path: Path, **changes: Any) -> Tokenizer:
    return load_tokenizer(DataConfig(train="", tokenizer=str(path), max_length=9, **changes))


def dropout(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def truncation(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_truncation(7, stride=2)


def padding(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", pad_to_multiple_of=8)


def fixed_padding(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_padding(direction="left", length=900)


def post_processor(tokenizer: tokenizers.Tokenizer) -> None:
    ends = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A </s>", special_tokens=ends)


def doubling(tokenizer: tokenizers.Tokenizer) -> None:
    """A post-processor that acts without special tokens, too."""
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A $A", special_tokens=[])


def all_of_them(tokenizer: tokenizers.Tokenizer) -> None:
    for change in (dropout, truncation, padding, post_processor):
        change(tokenizer)


@pytest.mark.parametrize(
    "change",
    [dropout, truncation, padding, fixed_padding, post_processor, doubling, all_of_them],
    ids=lambda change: change.__name__,
)
def test_what_a_file_stores_does_not_steer_encoding(change: Change, tmp_path: Path) -> None:
    plain = byte_level()
    expected = [plain.encode(text).ids for text in (LONG, SHORT)]
    change(plain)
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    for _ in range(5):
        assert [tokenizer.encode(text) for text in (LONG, SHORT)] == expected
        assert tokenizer.encode_batch([LONG, SHORT]) == expected
    assert tokenizer.decode(tokenizer.encode(LONG)) == LONG


def with_gaps(tmp_path: Path) -> Path:
    """A vocabulary whose ids have gaps: the count of its tokens is the id of one of them."""
    vocabulary = {letter: 3 * index for index, letter in enumerate("abcdefghij")}
    model = tokenizers.models.BPE(vocabulary, [])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_invented_ids_do_not_collide_where_ids_have_gaps(tmp_path: Path) -> None:
    tokenizer = load(with_gaps(tmp_path))
    real = set(tokenizer.encode("abcdefghij"))
    invented = [tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id]
    assert sorted(invented) == [28, 29, 30]
    assert not real & set(invented)
    assert tokenizer.num_ids == 31
    assert resolve_vocabulary(small_model(vocab_size="tokenizer"), tokenizer).vocab_size == 31


def test_an_invented_id_is_no_other_given_one(tmp_path: Path) -> None:
    tokenizer = load(with_gaps(tmp_path), mask_token=28, eos_token=30)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id) == (28, 30, 29)


def test_added_tokens_keep_the_ids_that_a_file_states(tmp_path: Path) -> None:
    """The library counts on from the vocabulary's size, whatever the file says."""
    path = with_gaps(tmp_path)
    stored = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    stored["added_tokens"] = [{"id": 40, "content": "<mask>", "special": True, **flags}]
    path.write_text(json.dumps(stored))
    assert tokenizers.Tokenizer.from_file(str(path)).token_to_id("<mask>") == 10
    tokenizer = load(path)
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.num_ids) == (40, 41, 43)
    for token_id, message in ((27, "the id 27 is that of 'j' and of '<mask>'"),):
        stored["added_tokens"][0]["id"] = token_id
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match=message):
            load(path)


def test_tokens_that_files_beside_a_tokenizer_add(tmp_path: Path) -> None:
    path = with_gaps(tmp_path)
    entry = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    settings = {"added_tokens_decoder": {"30": {**entry, "special": True}}, "mask_token": "<|mask|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|mask|>": 28}))
    tokenizer = load(path, eos_token="<|im_end|>", mask_token="<|mask|>")
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (30, 28, 31)
    assert tokenizer.encode_pieces(["ab<|im_end|>"]) == [[0, 3, 30]]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|mask|>": 30}))
    with pytest.raises(UserError, match=r"tokenizer.json: the id 30 is that of '<\|mask\|>' and of '<\|im_end\|>'"):
        load(path)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LONG, *TEXTS[:3]] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=90,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        control_symbols=["<ctl>"],
        user_defined_symbols=["<mask>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_tokens_added_to_a_sentencepiece_model(sentencepiece_model: Path) -> None:
    size = load(sentencepiece_model).backend.num_ids
    added = sentencepiece_model.parent / "added_tokens.json"
    added.write_text(json.dumps({"<|im_end|>": size, "<|im_start|>": size + 7}))
    tokenizer = load(sentencepiece_model, pad_token="<|im_end|>", eos_token="<|new|>")
    added.unlink()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.num_ids) == (size, size + 8, size + 9)
    assert tokenizer.encode_pieces(["<|im_start|>long text"])[0] == [size + 7, *tokenizer.encode("long text")]
    assert tokenizer.decode([size + 7, *tokenizer.encode("long text"), size + 3]) == "long text"


def vocabulary_folder(tmp_path: Path, name: str) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as a checkpoint without tokenizer.json has them."""
    trained = json.loads(byte_level().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(trained["model"]["vocab"]), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in trained["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    size = len(trained["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
    decoder = {str(size + index): {"content": text, "special": True, **flags} for index, text in enumerate(names)}
    decoder[str(size + 4)] = {"content": "<tool_call>", "special": False, **flags}
    settings = {"tokenizer_class": name, "added_tokens_decoder": decoder, "mask_token": "<|mask|>"}
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_vocabulary_and_merges_give_transformers_tokens(name: str, tmp_path: Path) -> None:
    import transformers

    folder = vocabulary_folder(tmp_path, name)
    theirs = getattr(transformers, name).from_pretrained(str(folder))
    tokens = {"mask_token": "<|mask|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = load(folder, **tokens)
    chat = [f"<|im_start|>user\n{text}<|im_end|>\n<tool_call> x <|endoftext|>" for text in TEXTS]
    for text in [*TEXTS, LONG]:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text))
    assert tokenizer.encode_pieces(chat) == [theirs.encode(text) for text in chat]
    assert tokenizer.mask_id == theirs.convert_tokens_to_ids("<|mask|>")
    assert load(folder / "vocab.json", **tokens).encode(LONG) == theirs.encode(LONG)
    if name == "Qwen2Tokenizer":  # Dream's own class, which is remote code, is a copy of this one
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "DreamTokenizer"}))
        assert load(folder, **tokens).encode_pieces(chat) == tokenizer.encode_pieces(chat)


def without_merges(folder: Path) -> str:
    (folder / "merges.txt").unlink()
    return "merges.txt: absent"


def another_class(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Wav2Vec2CTCTokenizer"}')
    return "names the class 'Wav2Vec2CTCTokenizer', but only Qwen2Tokenizer"


def broken_merges(folder: Path) -> str:
    (folder / "merges.txt").write_text("#version: 0.2\nQ QQQQ\n")
    return "vocab.json: not a"


def broken_settings(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text("{")
    return "tokenizer_config.json: not readable as JSON"


def nothing(folder: Path) -> str:
    for path in folder.iterdir():
        path.unlink()
    return "tokenizer.json: no such tokenizer file"


@pytest.mark.parametrize("fault", [without_merges, another_class, broken_merges, broken_settings, nothing])
def test_faults_of_a_folder_are_named(fault: Callable[[Path], str], tmp_path: Path) -> None:
    expected = fault(vocabulary_folder(tmp_path, "Qwen2Tokenizer"))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
