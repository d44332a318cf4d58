"""A tokenizer's files in a folder: which one is read, and what those beside it say of added and special tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256

VOCABULARY = "vocab.json"
MERGES = "merges.txt"
# In the order in which a folder's are looked for.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", VOCABULARY)
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


class Added(NamedTuple):
    """A token that stands beside a tokenizer's vocabulary."""

    content: str
    id: int
    flags: Mapping[str, bool]  # by FLAGS, those that are stated


def tokenizer_file(path: str | Path) -> Path:
    """The file of a tokenizer that is named by file or folder; of a folder without any, the first that is missed."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in TOKENIZER_FILES if (path / name).is_file()), path / TOKENIZER_FILES[0])


def tokenizer_fingerprint(path: str) -> str:
    """sha256 of the tokenizer's file, or of all that it is built from; empty where there is none."""
    if not path:
        return ""
    file = tokenizer_file(path)
    if file.name != VOCABULARY:
        return sha256(file)
    parts = [sha256(file), sha256(file.parent / MERGES), str(added_beside(file))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def special_names(file: Path) -> dict[str, dict[str, str]]:
    """Texts by 'mask_token', 'eos_token' …, by the file that names them: special_tokens_map.json, and what goes before
    it, tokenizer_config.json. {} for a tokenizer file of an unusual name, whose neighbours may belong to anything."""
    named: dict[str, dict[str, str]] = {}
    for name in (SPECIAL_TOKENS, SETTINGS) if file.name in TOKENIZER_FILES else ():
        texts = {key: _text(value) for key, value in _json_object(file.parent / name).items()}
        named[name] = {key: text for key, text in texts.items() if key.endswith("_token") and text}
    return named


def further_special_names(file: Path) -> list[str]:
    """Texts of the special tokens that these files list without a role."""
    found: list[str] = []
    for name in (SPECIAL_TOKENS, SETTINGS) if file.name in TOKENIZER_FILES else ():
        described = _json_object(file.parent / name)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = described.get(key)
            values = list(value.values()) if isinstance(value, dict) else value
            found += [_text(token) for token in values if _text(token)] if isinstance(values, list) else []
    return found


def added_beside(file: Path) -> list[Added]:
    """Tokens that files beside the tokenizer's own add, by id: added_tokens.json and tokenizer_config.json."""
    if file.name not in TOKENIZER_FILES:
        return []
    special = {text for texts in special_names(file).values() for text in texts.values()}
    special |= set(further_special_names(file))
    added: dict[str, Added] = {}
    for content, token_id in _json_object(file.parent / ADDED_TOKENS).items():
        if type(token_id) is int:
            added[content] = Added(content, token_id, {"special": content in special})
    decoder = _json_object(file.parent / SETTINGS).get("added_tokens_decoder")
    for token_id, value in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(value, dict) and _text(value) and token_id.isdecimal():
            flags = {name: value[name] for name in FLAGS if isinstance(value.get(name), bool)}
            added[value["content"]] = Added(value["content"], int(token_id), flags)
    return sorted(added.values(), key=lambda token: token.id)


def tokenizer_class(folder: Path) -> str:
    """The name of transformers' class that tokenizer_config.json gives; empty where it gives none."""
    name = _json_object(folder / SETTINGS).get("tokenizer_class")
    return name if isinstance(name, str) else ""


def _text(token: Any) -> str:
    """The text of a token that is given as a text or as an object; empty for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _json_object(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
