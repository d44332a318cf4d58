"""Sentencepiece models and Hugging Face tokenizer files behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.schema import DataConfig, ModelConfig
from megatron_mdm.data.templates import NEEDED_TOKENS, TEMPLATES, Template


class _Backend(Protocol):
    num_ids: int

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, token: str) -> int | None: ...

    def piece(self, token_id: int) -> str: ...


@dataclass(frozen=True)
class Tokenizer:
    """Text ↔ ids, and the special ids of masked diffusion."""

    backend: _Backend
    num_ids: int  # special tokens that were added included
    mask_id: int
    pad_id: int
    eos_id: int
    template: Template  # of conversations

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special tokens are added."""
        return self.backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts at once, which is faster."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, up to the first eos; mask and padding are left out."""
        kept: list[int] = []
        for token in ids:
            if token == self.eos_id:
                break
            if token not in (self.mask_id, self.pad_id) and token < self.backend.num_ids:
                kept.append(int(token))
        return self.backend.decode(kept)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of ids for a person's eyes: end tokens as ⏎, ids that have no text by number."""
        text, run = "", list[int]()
        for token in [*ids, -1]:
            if token in (-1, self.eos_id) or token >= self.backend.num_ids:
                text, run = text + (self.backend.decode(run) if run else ""), []
                text += "" if token == -1 else "⏎" if token == self.eos_id else f"<{token}>"
            else:
                run.append(int(token))
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id stands for, spaces included: together, the text they encode. Added ids are empty."""
        return [self.backend.piece(token) if token < self.backend.num_ids else "" for token in ids]


def load_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a data section. A special token that the file lacks gets the next free id."""
    backend = _open(data.tokenizer)
    num_ids = backend.num_ids
    special: dict[str, int] = {}
    for name in ("mask_token", "pad_token", "eos_token"):
        token = getattr(data, name)
        token_id = backend.token_id(token) if isinstance(token, str) else token
        if token_id is None:
            token_id = special.get(token, num_ids)
            num_ids += token_id == num_ids
            special[token] = token_id
        special[name] = token_id
    if special["mask_token"] in (special["pad_token"], special["eos_token"]):
        raise UserError(f"'data.mask_token' has the id {special['mask_token']} of another special token")
    missing = [token for token in NEEDED_TOKENS.get(data.template, ()) if backend.token_id(token) is None]
    if missing:
        raise UserError(f"'data.template' {data.template} needs the token {missing[0]}, which {data.tokenizer} lacks")
    template = TEMPLATES[data.template](data.tokenizer)
    return Tokenizer(backend, num_ids, special["mask_token"], special["pad_token"], special["eos_token"], template)


def resolve_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model section with vocab_size as a number that holds every id. Raises UserError where it cannot."""
    size = tokenizer.num_ids if model.vocab_size == "tokenizer" else model.vocab_size
    for name in ("mask", "pad", "eos"):
        token_id = getattr(tokenizer, f"{name}_id")
        if not 0 <= token_id < size:
            raise UserError(
                f"'data.{name}_token': id {token_id} is outside the vocabulary of {size} ids; "
                "correct it or raise 'model.vocab_size'"
            )
    if tokenizer.num_ids > size:
        raise UserError(f"'model.vocab_size' {size} is smaller than the tokenizer's {tokenizer.num_ids} ids")
    return model.model_copy(update={"vocab_size": size})


def tokenizer_fingerprint(path: str) -> str:
    """sha256 of the tokenizer's file; empty where there is none."""
    return sha256(_file(path)) if path else ""


def _file(path: str) -> Path:
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def _open(path: str) -> _Backend:
    if not path:
        return _Ids()
    file = _file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer file ('data.tokenizer')")
    try:
        return _HuggingFace(file) if file.suffix == ".json" else _SentencePiece(file)
    except Exception as error:  # both libraries raise bare exceptions of their own
        raise UserError(f"{file}: not a sentencepiece model or tokenizer.json ({_first_line(error)})") from None


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.num_ids = self.processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        token_id = self.processor.piece_to_id(token)
        return token_id if self.processor.id_to_piece(token_id) == token else None

    def piece(self, token_id: int) -> str:
        if self.processor.is_byte(token_id):
            return chr(int(self.processor.id_to_piece(token_id)[3:-1], 16))  # <0x0A>
        return self.processor.id_to_piece(token_id).replace("▁", " ")


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.num_ids = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def piece(self, token_id: int) -> str:
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        space = (self.tokenizer.id_to_token(token_id) or "").startswith("▁") and not text.startswith(" ")
        return " " * space + text


class _Ids:
    """No tokenizer: data come as ids, and texts are their decimal numbers."""

    num_ids = 0

    def encode(self, text: str) -> list[int]:
        raise UserError("'data.tokenizer' is empty: only samples with 'input_ids' can be read")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def token_id(self, token: str) -> int | None:
        return None

    def piece(self, token_id: int) -> str:
        return f"{token_id} "


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
