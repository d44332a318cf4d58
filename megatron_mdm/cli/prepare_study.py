"""`mdm prepare study`: the small study's data: sets of its tasks, a mix to pretrain on, the tokenizer of both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mdm.cli import tokenizer
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.study_sets import TASKS, Held, Sizes, pretraining_mix
from megatron_mdm.data.word_problems import LARGEST

_VOCABULARY = 1024
_FOR_TOKENIZER = 4000  # samples of the mix, besides those of fine-tuning
_HELD_OUT = 500  # samples of the mix


def write_study(arguments: argparse.Namespace) -> None:
    """TASK/{train,validation,test}.jsonl, mix/{train,validation}.jsonl, tokenizer.model."""
    folder: Path = arguments.output
    sizes = Sizes(arguments.train, arguments.validation, arguments.test)
    tasks = {name: make(sizes, arguments.seed) for name, make in TASKS.items()}
    try:
        for name, sets in tasks.items():
            for part, samples in sets.items():
                _write(folder / name / f"{part}.jsonl", samples)
        mix = pretraining_mix(arguments.mix, Held.of(tasks), arguments.seed)
        _write(folder / "mix" / "train.jsonl", mix[_HELD_OUT:])
        _write(folder / "mix" / "validation.jsonl", mix[:_HELD_OUT])
        seen = [sample for sets in tasks.values() for sample in sets["train"]]
        texts = [{"text": _text(sample)} for sample in (*mix[:_FOR_TOKENIZER], *seen)]
        _write(folder / "tokenizer.jsonl", texts)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None
    tokenizer.train(
        argparse.Namespace(
            data=str(folder / "tokenizer.jsonl"),
            field="text",
            on_error="stop",
            output=str(folder / "tokenizer.model"),
            vocab_size=_VOCABULARY,
            model_type="bpe",
            whole_numbers=LARGEST,
            byte_fallback=False,
        )
    )


def _text(sample: dict[str, Any]) -> str:
    return "\n".join(sample[key] for key in ("question", "answer", "prompt", "response") if key in sample)


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines))
    print(f"{path}: {len(lines):,} lines")
