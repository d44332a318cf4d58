"""Supervised fine-tuning samples: prompts and responses, conversations, or token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.conversation import ASSISTANT, USER, Message, Piece
from megatron_mdm.data.records import BadRecords, Record, read_records
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.diffusion.randomness import Purpose, stream

TEXT_FIELDS = (("question", "answer"), ("prompt", "response"))
_RECORDS_AT_ONCE = 1024  # that the tokenizer is given


@dataclass(frozen=True)
class SftDataset:
    """Tokenised samples in memory, in the file's order."""

    samples: Sequence[Sample]
    num_too_long: int  # left out, or cut: longer than max_length
    fingerprint: str  # sha256 of the file
    num_bad: int = 0  # left out: not readable
    first_bad: tuple[str, ...] = ()  # where some of them are, and what is wrong
    records: Sequence[int] = ()  # of each sample; empty: every sample is a record of its own

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(sample.tokens) for sample in self.samples], dtype=np.int64)

    def num_eligible(self) -> NDArray[np.int64]:
        """P of every sample."""
        return np.array([np.count_nonzero(sample.eligible) for sample in self.samples], dtype=np.int64)

    def num_delimiters(self) -> NDArray[np.int64]:
        """Marked delimiters of every sample."""
        return np.array([np.count_nonzero(sample.delimiters) for sample in self.samples], dtype=np.int64)

    def with_samples(self, samples: Sequence[Sample]) -> SftDataset:
        return replace(self, samples=samples)

    def subset(self, rows: Sequence[int] | NDArray[np.int64]) -> SftDataset:
        records = [self.records[row] for row in rows] if self.records else ()
        return SftDataset([self.samples[row] for row in rows], 0, self.fingerprint, records=records)


def read_sft(path: str, tokenizer: Tokenizer, data: DataConfig, vocab_size: int) -> SftDataset:
    """Read JSON lines, parquet or a `datasets` name, in any of the forms that README.md lists.

    Raises UserError with the line of the first bad record, unless data.on_error says to skip them; then they are
    counted.
    """
    bad = BadRecords(data.on_error == "skip")
    samples: list[Sample] = []
    records: list[int] = []
    num_too_long = 0
    for record, where, sample in _tokenised(path, tokenizer, data, bad):
        if not sample.eligible.any():
            bad.add(f"{where}: no eligible token: the response is empty")
        elif sample.tokens.min() < 0 or sample.tokens.max() >= vocab_size:
            bad.add(f"{where}: a token id is outside the vocabulary of {vocab_size} ids")
        elif (sample.tokens == tokenizer.mask_id).any():
            place = int(np.argmax(sample.tokens == tokenizer.mask_id))
            bad.add(f"{where}: token {place} is the mask token {tokenizer.mask_id}, which clean data cannot hold")
        elif len(sample.tokens) <= data.max_length:
            samples.append(sample)
            records.append(record)
        else:
            num_too_long += 1
            if data.too_long == "error":
                raise UserError(
                    f"{where}: {len(sample.tokens)} tokens exceed 'data.max_length' {data.max_length}; raise it, or "
                    "set 'data.too_long' to drop or truncate"
                )
            if data.too_long == "truncate" and sample.eligible[: data.max_length].any():
                samples.append(Sample(sample.tokens[: data.max_length], sample.eligible[: data.max_length]))
                records.append(record)
    if not samples:
        raise UserError(
            f"{path}: no sample left ({num_too_long} longer than 'data.max_length' {data.max_length}, {bad.count} bad)"
        )
    fingerprint = sha256(Path(path)) if Path(path).is_file() else path
    records = records if len(set(records)) < len(records) else []
    return SftDataset(samples, num_too_long, fingerprint, bad.count, tuple(bad.first), records)


def split_validation(data: SftDataset, fraction: float, seed: int) -> tuple[SftDataset, SftDataset]:
    """(training, validation): a random, seeded share of at least one record, with all its samples, for validation."""
    records = np.unique(data.records, return_inverse=True)[1] if data.records else np.arange(len(data))
    num_records = int(records.max()) + 1
    order = stream(seed, Purpose.SPLIT).permutation(num_records)
    num_validation = max(1, round(num_records * fraction))
    if num_validation >= num_records:
        raise UserError(f"'data.validation_fraction' {fraction} leaves no training sample of {num_records}")
    held_out = np.isin(records, order[:num_validation])
    train = data.subset(np.flatnonzero(~held_out))
    train = replace(train, num_too_long=data.num_too_long, num_bad=data.num_bad, first_bad=data.first_bad)
    return train, data.subset(np.flatnonzero(held_out))


def prompt_and_response(record: Record, where: str) -> tuple[str, str]:
    """The two texts of a record in one of the known pairs of fields."""
    for fields in TEXT_FIELDS:
        if all(field in record for field in fields):
            prompt, response = (record[field] for field in fields)
            if not (isinstance(prompt, str) and isinstance(response, str)):
                raise UserError(f"{where}: '{fields[0]}' and '{fields[1]}' must be strings")
            return prompt, response
    raise UserError(
        f"{where}: expected the fields question and answer, prompt and response, messages, or input_ids and "
        f"prompt_length; found {', '.join(record) or 'none'}"
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
    """What stands before a response, in the tokenizer's template."""
    try:
        pieces = tokenizer.prompt_of([Message(USER, prompt)])
    except ValueError as error:
        raise UserError(f"the prompt {prompt[:40]!r}: {error}") from None
    return [
        token for piece, ids in zip(pieces, tokenizer.ids_of(pieces)) for token in _ended(piece, ids, tokenizer.eos_id)
    ]


class _Draft(NamedTuple):
    """A sample on its way: either texts that are to be tokenised, or a sample."""

    record: int
    where: str
    content: Sample | list[Piece]


def _tokenised(path: str, tokenizer: Tokenizer, data: DataConfig, bad: BadRecords) -> Iterator[tuple[int, str, Sample]]:
    drafts = _drafts(path, tokenizer, data, bad)
    while batch := list(islice(drafts, _RECORDS_AT_ONCE)):
        pieces = [piece for draft in batch if isinstance(draft.content, list) for piece in draft.content]
        ids = iter(tokenizer.ids_of(pieces) if pieces else [])
        for record, where, content in batch:
            yield record, where, content if isinstance(content, Sample) else _joined(content, ids, tokenizer.eos_id)


def _drafts(path: str, tokenizer: Tokenizer, data: DataConfig, bad: BadRecords) -> Iterator[_Draft]:
    for number, (where, record) in enumerate(read_records(path, bad)):
        try:
            if "input_ids" in record:
                yield _Draft(number, where, _of_ids(record, where))
                continue
            conversation = _messages(record, where)
            for pieces in tokenizer.samples_of(conversation, last_only=data.eligible_turns == "last"):
                yield _Draft(number, where, pieces)
        except UserError as error:
            bad.add(str(error))
        except ValueError as error:
            bad.add(f"{where}: {error}")


def _joined(pieces: list[Piece], ids: Iterator[list[int]], eos_id: int) -> Sample:
    tokens: list[int] = []
    eligible: list[bool] = []
    for piece in pieces:
        own = _ended(piece, next(ids), eos_id)
        tokens += own
        eligible += [piece.learnt] * len(own)
    return Sample(np.array(tokens, dtype=np.int32), np.array(eligible, dtype=np.bool_))


def _ended(piece: Piece, ids: list[int], eos_id: int) -> list[int]:
    return [*ids, eos_id] if piece.ends and ids else ids


def _messages(record: Record, where: str) -> list[Message]:
    turns = record.get("messages")
    if turns is None:
        prompt, response = prompt_and_response(record, where)
        return [Message("user", prompt), Message(ASSISTANT, response)]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise UserError(f"{where}: 'messages' must be a list of objects with the strings 'role' and 'content'")
    if not any(turn["role"] == ASSISTANT for turn in turns):
        raise UserError(f"{where}: 'messages' holds no turn of the role '{ASSISTANT}'")
    own = ("role", "content")
    return [
        Message(turn["role"], turn["content"], {name: turn[name] for name in turn if name not in own}) for turn in turns
    ]


def _of_ids(record: Record, where: str) -> Sample:
    """Token ids; eligible from prompt_length on, or in 'spans', pairs of first and end position."""
    ids: Any = record["input_ids"]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UserError(f"{where}: 'input_ids' must be a list of integers")
    prompt_length, spans = record.get("prompt_length"), record.get("spans")
    if spans is None:
        if type(prompt_length) is not int:
            raise UserError(f"{where}: 'input_ids' must be a list of integers and 'prompt_length' an integer")
        if not 0 <= prompt_length <= len(ids):
            raise UserError(f"{where}: 'prompt_length' {prompt_length} does not fit {len(ids)} 'input_ids'")
        spans = [[prompt_length, len(ids)]]
    eligible = np.zeros(len(ids), dtype=np.bool_)
    for span in spans if isinstance(spans, list) else [spans]:
        if not (isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)):
            raise UserError(f"{where}: 'spans' must be a list of pairs [first, end]")
        if not 0 <= span[0] <= span[1] <= len(ids):
            raise UserError(f"{where}: the span {span} does not fit {len(ids)} 'input_ids'")
        eligible[span[0] : span[1]] = True
    return Sample(np.array(ids, dtype=np.int32), eligible)
