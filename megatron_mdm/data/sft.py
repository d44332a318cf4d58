"""Supervised fine-tuning samples from JSON lines: a prompt that is given and a response that is learnt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.templates import plain_prompt
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.diffusion.randomness import Purpose, stream

TEXT_FIELDS = (("question", "answer"), ("prompt", "response"))


@dataclass(frozen=True)
class SftDataset:
    """Tokenised samples in memory, in the file's order."""

    samples: Sequence[Sample]
    num_too_long: int  # left out: longer than max_length
    fingerprint: str  # sha256 of the file

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(sample.tokens) for sample in self.samples], dtype=np.int64)

    def num_eligible(self) -> NDArray[np.int64]:
        """P of every sample."""
        return np.array([np.count_nonzero(sample.eligible) for sample in self.samples], dtype=np.int64)

    def subset(self, rows: Sequence[int] | NDArray[np.int64]) -> SftDataset:
        return SftDataset([self.samples[row] for row in rows], 0, self.fingerprint)


def read_sft(
    path: str, tokenizer: Tokenizer, max_length: int, too_long: Literal["drop", "error"], vocab_size: int
) -> SftDataset:
    """Read a JSONL file whose lines hold question/answer, prompt/response, or input_ids/prompt_length.

    Text responses end in an eos, which is learnt. Raises UserError with the line number of the first bad line.
    """
    samples: list[Sample] = []
    num_too_long = 0
    for where, record in read_records(path):
        sample = _sample(record, tokenizer, where)
        if len(sample.tokens) > max_length:
            if too_long == "error":
                raise UserError(
                    f"{where}: {len(sample.tokens)} tokens exceed 'data.max_length' {max_length}; raise it, or set "
                    "'data.too_long' to drop"
                )
            num_too_long += 1
            continue
        if not sample.eligible.any():
            raise UserError(f"{where}: no eligible token: the response is empty")
        if sample.tokens.min() < 0 or sample.tokens.max() >= vocab_size:
            raise UserError(f"{where}: a token id is outside the vocabulary of {vocab_size} ids")
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: no sample left ({num_too_long} longer than 'data.max_length' {max_length})")
    return SftDataset(samples, num_too_long, sha256(Path(path)))


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of each line of a JSONL file that is not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where}: not valid JSON ({error})") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: expected an object, found {type(record).__name__}")
                yield where, record
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def split_validation(data: SftDataset, fraction: float, seed: int) -> tuple[SftDataset, SftDataset]:
    """(training, validation): a random, seeded share of at least one sample for validation."""
    order = stream(seed, Purpose.SPLIT).permutation(len(data))
    num_validation = max(1, round(len(data) * fraction))
    if num_validation >= len(data):
        raise UserError(f"'data.validation_fraction' {fraction} leaves no training sample of {len(data)}")
    train = data.subset(np.sort(order[num_validation:]))
    return replace(train, num_too_long=data.num_too_long), data.subset(np.sort(order[:num_validation]))


def prompt_and_response(record: dict[str, Any], where: str) -> tuple[str, str]:
    """The two texts of a record in one of the known pairs of fields."""
    for fields in TEXT_FIELDS:
        if all(field in record for field in fields):
            prompt, response = (record[field] for field in fields)
            if not (isinstance(prompt, str) and isinstance(response, str)):
                raise UserError(f"{where}: '{fields[0]}' and '{fields[1]}' must be strings")
            return prompt, response
    raise UserError(
        f"{where}: expected the fields question and answer, prompt and response, or input_ids and prompt_length; "
        f"found {', '.join(record) or 'none'}"
    )


def read_prompts(path: str) -> list[str]:
    """The field 'prompt' or 'question' of every record."""
    prompts = []
    for where, record in read_records(path):
        prompt = record.get("prompt", record.get("question"))
        if not isinstance(prompt, str):
            raise UserError(f"{where}: expected a string in the field 'prompt' or 'question'")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: no prompts")
    return prompts


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(plain_prompt(prompt))


def _sample(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Sample:
    if "input_ids" in record and "prompt_length" in record:
        ids, prompt_length = record["input_ids"], record["prompt_length"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids) or type(prompt_length) is not int:
            raise UserError(f"{where}: 'input_ids' must be a list of integers and 'prompt_length' an integer")
        if not 0 <= prompt_length <= len(ids):
            raise UserError(f"{where}: 'prompt_length' {prompt_length} does not fit {len(ids)} 'input_ids'")
        return Sample.of(np.array(ids, dtype=np.int32), prompt_length)
    prompt, response = prompt_and_response(record, where)
    prompt_ids, response_ids = encode_prompt(prompt, tokenizer), tokenizer.encode(response)
    if response_ids:
        response_ids = [*response_ids, tokenizer.eos_id]
    return Sample.of(np.array(prompt_ids + response_ids, dtype=np.int32), len(prompt_ids))
