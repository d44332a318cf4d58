"""Tokenizer files behind one interface: sentencepiece models, tokenizer.json, and vocab.json with merges.txt.

What a file stores beside its vocabulary (truncation, padding, a post-processor, BPE's dropout) is switched off:
encoding gives the whole text, nothing else, and the same every time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.byte_level import byte_level_description
from megatron_mdm.data.tokenizer_folder import (
    FLAGS,
    VOCABULARY,
    Added,
    added_beside,
    further_special_names,
    special_names,
    tokenizer_file,
)

Json = dict[str, Any]
_WORTH_THREADS = 64  # texts at once: for fewer, starting threads takes longer than encoding
_TAG = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # what a special token looks like, even where no file says that it is one


class Special(NamedTuple):
    """A control token: never the encoding of a text, but what a template writes."""

    id: int
    strips_left: bool = False  # it swallows the white space before it
    strips_right: bool = False
    normalized: bool = False  # it is looked for in the normalised text


class Backend(Protocol):
    num_ids: int  # the highest id + 1, added tokens included

    @property
    def special(self) -> Mapping[str, Special]:
        """By text."""

    unknown_id: int | None  # of the token that stands for what the vocabulary lacks
    parses_special: bool  # whether it can find special tokens in a text by itself

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """Ids of texts. Special tokens' texts are text, unless they are to be parsed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""

    def token_id(self, token: str) -> int | None: ...

    def token(self, token_id: int) -> str | None:
        """The text by which token_id finds it."""

    def piece(self, token_id: int) -> str:
        """The text that an id stands for, spaces included."""

    def make_special(self, token: str) -> None:
        """Treat a token that the file has as a control token from now on."""


def open_tokenizer(path: str | Path) -> Backend:
    """Raises UserError naming the file that is absent or not what it should be; an empty path: ids only."""
    if not str(path):
        return Ids()
    file = tokenizer_file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer file ('data.tokenizer')")
    beside = added_beside(file)
    try:
        if file.suffix != ".json":
            backend: Backend = SentencePiece(file, beside)
        elif file.name == VOCABULARY:
            backend = HuggingFace(json.dumps(byte_level_description(file.parent)), beside, file)
        else:
            backend = HuggingFace(file.read_text(encoding="utf-8"), beside, file)
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare exceptions of their own
        raise UserError(f"{file}: not a sentencepiece model or tokenizer.json ({_first_line(error)})") from None
    named = [text for texts in special_names(file).values() for text in texts.values()]
    for token in [*named, *further_special_names(file)]:
        if backend.token_id(token) is not None:
            backend.make_special(token)
    return backend


class HuggingFace:
    """A tokenizer of the `tokenizers` library."""

    parses_special = True

    def __init__(self, text: str, beside: Sequence[Added], file: Path) -> None:
        """text: of a tokenizer.json. Raises UserError where two tokens have one id."""
        tokenizer = tokenizers.Tokenizer.from_str(text)
        description = json.loads(text)
        self.tokenizer = _with_stated_ids(tokenizer, description, beside, file)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.post_processor = None
        if hasattr(self.tokenizer.model, "dropout"):  # BPE's
            self.tokenizer.model.dropout = None
        model = description["model"]
        unknown = model.get("unk_id") if model.get("type") == "Unigram" else model.get("unk_token")
        self.unknown_id = self.token_id(unknown) if isinstance(unknown, str) else unknown
        self.num_ids = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special = self._special()

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = not parse_special
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        return self.tokenizer.id_to_token(token_id) if 0 <= token_id < self.num_ids else None

    def piece(self, token_id: int) -> str:
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        space = (self.tokenizer.id_to_token(token_id) or "").startswith("▁") and not text.startswith(" ")
        return " " * space + text

    def make_special(self, token: str) -> None:
        """Make it special as transformers does with tokens that a folder names; an ordinary word stays one."""
        if token not in self.special and (self._is_added(token) or _TAG.fullmatch(token)):
            self.tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
            self.special = self._special()

    def _is_added(self, token: str) -> bool:
        return self.token_id(token) in self.tokenizer.get_added_tokens_decoder()

    def _special(self) -> dict[str, Special]:
        return {
            token.content: Special(token_id, token.lstrip, token.rstrip, token.normalized)
            for token_id, token in sorted(self.tokenizer.get_added_tokens_decoder().items())
            if token.special
        }


class SentencePiece:
    """A sentencepiece model, with tokens that files beside it add."""

    parses_special = False

    def __init__(self, path: Path, beside: Sequence[Added]) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        size = self.processor.vocab_size()
        self.size = size
        self.unknown_id: int | None = self.processor.unk_id()
        self.added = {token.id: token for token in beside if token.id >= size}
        self.num_ids = max([size - 1, *self.added]) + 1
        control = [token for token in range(size) if self.processor.is_control(token)]
        self.special = {self.processor.id_to_piece(token): Special(token) for token in control}
        self.special |= {
            token.content: Special(token.id, token.flags.get("lstrip", False), token.flags.get("rstrip", False))
            for token in self.added.values()
        }

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        if len(texts) >= _WORTH_THREADS:
            return self._encode(list(texts))
        return [self._encode(text) for text in texts]

    def _encode(self, text: str | list[str]) -> Any:
        """Ids of a text, or of each of several, for which the library starts threads."""
        return self.processor.encode(
            text, add_bos=False, add_eos=False, reverse=False, emit_unk_piece=False, enable_sampling=False
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(token) for token in ids if token < self.size])

    def token_id(self, token: str) -> int | None:
        for added in self.added.values():
            if added.content == token:
                return added.id
        token_id = self.processor.piece_to_id(token)
        return token_id if self.processor.id_to_piece(token_id) == token else None

    def token(self, token_id: int) -> str | None:
        if token_id in self.added:
            return self.added[token_id].content
        return self.processor.id_to_piece(token_id) if 0 <= token_id < self.size else None

    def piece(self, token_id: int) -> str:
        if token_id >= self.size:
            return ""
        if self.processor.is_byte(token_id):
            return chr(int(self.processor.id_to_piece(token_id)[3:-1], 16))  # <0x0A>
        return self.processor.id_to_piece(token_id).replace("▁", " ")

    def make_special(self, token: str) -> None:
        token_id = self.token_id(token)
        if token_id is not None and token_id != self.unknown_id and _TAG.fullmatch(token):
            self.special.setdefault(token, Special(token_id))


class Ids:
    """No tokenizer: data come as ids, and texts are their decimal numbers."""

    num_ids = 0
    parses_special = False
    special: Mapping[str, Special] = {}
    unknown_id: int | None = None

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        if texts:
            raise UserError("'data.tokenizer' is empty, so no text can be encoded; set 'data.tokenizer'")
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def token_id(self, token: str) -> int | None:
        return None

    def token(self, token_id: int) -> str | None:
        return None

    def piece(self, token_id: int) -> str:
        return f"{token_id} "

    def make_special(self, token: str) -> None:
        pass


def _with_stated_ids(
    tokenizer: tokenizers.Tokenizer, description: Json, beside: Sequence[Added], file: Path
) -> tokenizers.Tokenizer:
    """The tokenizer with every added token under the id that the files state. The library itself numbers them from the
    vocabulary's size on, which collides with real ids where the vocabulary has gaps."""
    entries = description.get("added_tokens") or []
    known = {entry["content"]: entry["id"] for entry in entries}
    for token in beside:
        if known.get(token.content, token.id) != token.id:
            raise UserError(
                f"{file}: '{token.content}' has the id {known[token.content]}, but {token.id} by the files beside it"
            )
    more = [token for token in beside if token.content not in known]
    stated = {**known, **{token.content: token.id for token in more}}
    if not more and _disagreement(tokenizer, stated) is None:
        return tokenizer
    model = description["model"]
    if isinstance(model["vocab"], dict):  # a token that the model knows keeps the model's id
        model = {**model, "vocab": _joined(model["vocab"], stated, file)}
    entries = [*entries, *({**dict.fromkeys(FLAGS, False), **t.flags, "content": t.content, "id": t.id} for t in more)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**description, "model": model, "added_tokens": entries}))
    wrong = _disagreement(tokenizer, stated)
    if wrong is not None:
        raise UserError(
            f"{file}: the added token '{wrong}' has the id {stated[wrong]} there, but gets "
            f"{tokenizer.token_to_id(wrong)} behind this vocabulary; number added tokens without gaps"
        )
    return tokenizer


def _disagreement(tokenizer: tokenizers.Tokenizer, stated: Mapping[str, int]) -> str | None:
    """The first token that the library would have under another id."""
    return next((token for token, token_id in stated.items() if tokenizer.token_to_id(token) != token_id), None)


def _joined(vocabulary: dict[str, int], stated: Mapping[str, int], file: Path) -> dict[str, int]:
    owners = {token_id: token for token, token_id in vocabulary.items()}
    for token, token_id in stated.items():
        if vocabulary.get(token, token_id) != token_id:
            raise UserError(f"{file}: '{token}' has two ids, {vocabulary[token]} and, as an added token, {token_id}")
        if owners.setdefault(token_id, token) != token:
            raise UserError(f"{file}: the id {token_id} is that of '{owners[token_id]}' and of '{token}'")
    return {**vocabulary, **stated}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
