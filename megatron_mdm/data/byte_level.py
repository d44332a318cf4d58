"""vocab.json and merges.txt, as Qwen2, Dream and GPT-2 keep them → what a tokenizer.json would hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.tokenizer_folder import MERGES, SETTINGS, VOCABULARY, tokenizer_class

Json = dict[str, Any]
# How Qwen2 cuts a text before bytes are merged (transformers: Qwen2Tokenizer).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_level_description(folder: Path) -> Json:
    """Byte-level BPE of a folder's vocab.json and merges.txt, without added tokens.

    Raises UserError where a file is absent or damaged, or tokenizer_config.json names a class that is not known.
    """
    name = tokenizer_class(folder)
    recipe = RECIPES.get(name.removesuffix("Fast"))
    if recipe is None:
        named = f"the class '{name}'" if name else "no class"
        raise UserError(
            f"{folder / VOCABULARY}: {SETTINGS} names {named}, but only {', '.join(RECIPES)} are built from "
            f"{VOCABULARY}; save the tokenizer as tokenizer.json"
        )
    if not (folder / MERGES).is_file():
        raise UserError(
            f"{folder / MERGES}: absent, but {VOCABULARY} needs it; or save the tokenizer as tokenizer.json"
        )
    vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    merges = [line.split() for line in lines[lines[0].startswith("#version") :] if line.strip()]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    return {"version": "1.0", "added_tokens": [], "decoder": {**_BYTES, "use_regex": True}, "model": model, **recipe()}


def _qwen2() -> Json:
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    pieces = {"type": "Sequence", "pretokenizers": [words, {**_BYTES, "use_regex": False}]}
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": pieces}


def _gpt2() -> Json:
    return {"normalizer": None, "pre_tokenizer": {**_BYTES, "use_regex": True}}


RECIPES: dict[str, Callable[[], Json]] = {"Qwen2Tokenizer": _qwen2, "DreamTokenizer": _qwen2, "GPT2Tokenizer": _gpt2}
