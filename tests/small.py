"""A small model and small data that tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_mdm.config.schema import ImageVocabulary, ModelConfig, RunConfig
from megatron_mdm.data.conversation import TemplateSource
from megatron_mdm.data.image_text import image_row
from megatron_mdm.data.templates import TEMPLATES
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.data.tokenizer_files import Special

VOCAB = 61
MASK = 60
PAD = 0
EOS = 1


def small_model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 64,
        "max_sequence_length": 64,
        "vocab_size": VOCAB,
        "vocab_divisor": 8,
    }
    return ModelConfig(**{**values, **changes})


def write_ids(
    path: Path, num_samples: int, seed: int = 0, length: tuple[int, int] = (8, 24), num_ids: int = MASK
) -> Path:
    """A JSONL file of token ids, from 2 on, with a learnable pattern: each response token repeats one of the prompt."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(num_samples):
        size = int(generator.integers(*length))
        prompt = int(generator.integers(2, size - 2))
        ids = generator.integers(2, num_ids, size)
        ids[prompt:] = ids[np.arange(size - prompt) % prompt]
        lines.append(json.dumps({"input_ids": ids.tolist(), "prompt_length": prompt}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


IMAGES = ImageVocabulary(task=40, bos=41, eos=EOS, image_begin=42, image_end=43, first_id=44, num_codes=16)


def write_images(path: Path, num_samples: int, codes_of: str = "a" * 64, seed: int = 0) -> Path:
    """A JSONL file of rows of a caption and an image of 9 codes, each of which is a token of the caption."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(num_samples):
        caption = generator.integers(2, 2 + IMAGES.num_codes, int(generator.integers(1, 6)))
        row = image_row(caption.tolist(), (caption[np.arange(9) % len(caption)] - 2).tolist(), IMAGES)
        record = {"input_ids": row.ids, "spans": [row.span], "caption": "…", "codes_of": codes_of}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


class Words:
    """A tokenizer's back end: words by their length."""

    num_ids = MASK
    parses_special = False
    special: ClassVar[dict[str, Special]] = {}
    unknown_id = None

    def token(self, token_id: int) -> str | None:
        return None

    def encode_batch(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        return [[10 + len(word) for word in text.split()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{token}" for token in ids)


def word_tokenizer() -> Tokenizer:
    return Tokenizer(Words(), VOCAB, MASK, PAD, EOS, TEMPLATES["plain"](TemplateSource("")))


def small_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run on write_ids data in folder/train.jsonl, in fp32; sections override the defaults key by key."""
    values: dict[str, Any] = {
        "model": small_model().model_dump(),
        "data": {
            "train": str(folder / "train.jsonl"),
            "mask_token": MASK,
            "pad_token": PAD,
            "eos_token": EOS,
            "max_length": 64,
        },
        "batch": {"global_size": 8, "micro_size": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"steps": 10},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"directory": str(folder / "run")},
        "logging": {"every": 1, "tensorboard": False},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return RunConfig.model_validate(values)
