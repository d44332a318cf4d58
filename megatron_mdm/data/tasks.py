"""Public data sets → samples for training and questions for tests, with the paper's splits (Appendix; formats.md)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.records import Record, read_records
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.diffusion.randomness import Purpose, stream

Sets = dict[str, list[Record]]  # by name: train, validation, test

OPENSCIENCE_TRAIN, OPENSCIENCE_TEST = 5000, 1000  # rows 1–5000, of which a tenth for validation; rows 5001–6000
IMAGE_TRAIN = 5000
# Ids of MMaDA's vocabulary.
T2I, BOS, EOS, IMAGE_BEGIN, IMAGE_END, MASK = 126_088, 126_080, 126_081, 126_084, 126_085, 126_336
NUM_IMAGE_CODES = 8192


def gsm8k(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """The official files, train and test, as they are; answers without a '####' are a mistake."""
    train, test = _two(paths, "gsm8k")
    return {"train": _questions(train, "####"), "test": _questions(test, "####")}


def hitab(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """Official splits. The prompt is title, table (pipe rows) and question; the response is \\boxed{answer}."""
    if len(paths) not in (2, 3):
        raise UserError("hitab: give the files of train, (dev) and test")
    names = ("train", "test") if len(paths) == 2 else ("train", "validation", "test")
    return {
        name: [_hitab_sample(record, where) for where, record in read_records(path)] for name, path in zip(names, paths)
    }


def openscience(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """The first 5,000 rows, 9 : 1 for training and validation, and rows 5,001 to 6,000 for the test."""
    (path,) = _one(paths, "openscience")
    rows = []
    for where, record in islice(read_records(path), OPENSCIENCE_TRAIN + OPENSCIENCE_TEST):
        prompt, response = (_first_of(record, names, where) for names in (("input", "prompt"), ("output", "response")))
        rows.append({"prompt": prompt, "response": response})
    if len(rows) <= OPENSCIENCE_TRAIN:
        raise UserError(f"{path}: {len(rows):,} rows, but the test set begins with row {OPENSCIENCE_TRAIN + 1:,}")
    return {**_nine_to_one(rows[:OPENSCIENCE_TRAIN], arguments.seed), "test": rows[OPENSCIENCE_TRAIN:]}


def text_to_image(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """{"caption", "image_codes"} lines → token ids in MMaDA's order; only the image's are learnt. 5,000 rows, 9 : 1."""
    (path,) = _one(paths, "text-to-image")
    if not arguments.tokenizer:
        raise UserError("text-to-image: name the captions' tokenizer with --tokenizer")
    tokenizer = load_tokenizer(
        DataConfig(
            train="", tokenizer=arguments.tokenizer, mask_token=126_336, pad_token=EOS, eos_token=EOS, max_length=2
        )
    )
    rows = []
    for where, record in islice(read_records(path), IMAGE_TRAIN):
        caption, codes = record.get("caption"), record.get("image_codes")
        if not isinstance(caption, str) or not isinstance(codes, list) or not codes:
            raise UserError(f"{where}: expected a string 'caption' and a list of integers 'image_codes'")
        if not all(type(code) is int and 0 <= code < NUM_IMAGE_CODES for code in codes):
            raise UserError(f"{where}: image codes must be integers from 0 to {NUM_IMAGE_CODES - 1}")
        head = [T2I, BOS, *tokenizer.encode(caption), EOS, IMAGE_BEGIN]
        ids = [*head, *(arguments.image_offset + code for code in codes), IMAGE_END]
        rows.append({"input_ids": ids, "spans": [[len(head), len(head) + len(codes)]], "caption": caption})
    return _nine_to_one(rows, arguments.seed)


PREPARERS: dict[str, Callable[[Sequence[str], argparse.Namespace], Sets]] = {
    "gsm8k": gsm8k,
    "hitab": hitab,
    "openscience": openscience,
    "text-to-image": text_to_image,
}


def boxed(text: str) -> str | None:
    """What the last \\boxed{…} holds, nested braces included; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin:place]
    return text[begin:]


def clean_answer(text: str) -> str:
    """A HiTab answer as it is compared: the \\boxed{} content, stripped, \\text{…} unwrapped, \\% as %, without other
    backslashes and without a trailing period."""
    inside = boxed(text)
    answer = (text if inside is None else inside).strip()
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer)
    answer = answer.replace("\\%", "%").replace("\\", "")
    return answer.strip().removesuffix(".").strip()


def _hitab_sample(record: Record, where: str) -> Record:
    answers = record.get("answer")
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: expected a list of answers in the field 'answer'")
    title, table, question = (_first_of(record, (name,), where) for name in ("title", "table", "question"))
    answer = ", ".join(_plain_number(value) for value in answers)
    prompt = f"Table: {title}\n{table}\nQuestion: {question}\nPut the answer into \\boxed{{}}."
    return {"prompt": prompt, "response": f"\\boxed{{{answer}}}", "answer": answer}


def _plain_number(value: Any) -> str:
    """29.0 is 29, as tables write it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _questions(path: str, mark: str) -> list[Record]:
    rows = []
    for where, record in read_records(path):
        question, answer = (_first_of(record, (name,), where) for name in ("question", "answer"))
        if mark not in answer:
            raise UserError(f"{where}: the answer has no '{mark}'")
        rows.append({"question": question, "answer": answer})
    return rows


def _first_of(record: Record, names: Sequence[str], where: str) -> str:
    for name in names:
        if isinstance(record.get(name), str):
            return record[name]
    raise UserError(f"{where}: expected a string in the field '{names[0]}'")


def _nine_to_one(rows: list[Record], seed: int) -> Sets:
    order = stream(seed, Purpose.SPLIT).permutation(len(rows))
    held_out = sorted(order[: max(1, len(rows) // 10)].tolist())
    kept = sorted(order[max(1, len(rows) // 10) :].tolist())
    return {"train": [rows[row] for row in kept], "validation": [rows[row] for row in held_out]}


def _one(paths: Sequence[str], name: str) -> Sequence[str]:
    if len(paths) != 1:
        raise UserError(f"{name}: give one file, or one name for `datasets`")
    return paths


def _two(paths: Sequence[str], name: str) -> Sequence[str]:
    if len(paths) != 2:
        raise UserError(f"{name}: give two files, train and test")
    return paths
