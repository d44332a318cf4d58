"""Prompts that a model answers itself, with all that their records say: what rewards are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import REFERENCE, WHERE, Prompt, conversation, prompt_and_response, prompt_of, renamed
from megatron_mdm.data.conversation import USER, Message
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.prompts import EncodedPrompt
from megatron_mdm.data.records import BadRecords, read_records
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.sft import SftDataset, contents, encoded, sample_of_ids
from megatron_mdm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptDataset(SftDataset):
    """Prompts in memory, in the file's order; samples are these with the records' own responses, cut to max_length, or
    prompts without a target where a record has none."""

    prompts: Sequence[EncodedPrompt] = ()
    # All columns of the records, and two more where they have none of these names: REFERENCE (None where the record has
    # no response) and WHERE
    columns: Sequence[Record] = ()

    BY_ROW: ClassVar[tuple[str, ...]] = ("samples", "records", "prompts", "columns")


class _Answered(NamedTuple):
    prompt: EncodedPrompt
    response: str | None
    sample: Sample


def read_prompt_set(
    path: str, tokenizer: Tokenizer, data: DataConfig, vocab_size: int, gen_length: int
) -> PromptDataset:
    """Read prompts from files of all forms that samples have (README.md); their responses may be absent.

    A prompt that leaves less than gen_length of data.max_length to a completion is too long: dropped and counted, or an
    error. Raises UserError with the line of the first bad record, unless data.on_error says to skip them.
    """
    bad = BadRecords(data.on_error)
    found: list[_Answered] = []
    columns: list[Record] = []
    num_too_long = 0
    for where, record in read_records(path, bad):
        with bad.of(where):
            answered = _read(record, tokenizer, data, vocab_size)
            _check(answered.prompt.ids, tokenizer, vocab_size)
            length = len(answered.prompt.ids)
            if length + gen_length <= data.max_length:
                found.append(answered)
                columns.append({WHERE: where, REFERENCE: answered.response, **record})
                continue
            num_too_long += 1
            if data.too_long == "error":
                raise UserError(
                    f"{where}: {length} tokens of prompt and {gen_length} of 'rl.generation.gen_length' exceed "
                    f"'data.max_length' {data.max_length}; raise it, or set 'data.too_long' to drop"
                )
    if not found:
        raise UserError(
            f"{path}: no prompt left; {num_too_long} leave less than {gen_length} tokens "
            f"('rl.generation.gen_length') of 'data.max_length' {data.max_length}{bad.summary()}"
        )
    samples = [_cut(answered.sample, data.max_length) for answered in found]
    prompts = [answered.prompt for answered in found]
    fingerprint = sha256(Path(path)) if Path(path).is_file() else contents(samples)
    return PromptDataset(samples, num_too_long, fingerprint, bad.count, tuple(bad.first), (), prompts, columns)


def _read(record: Record, tokenizer: Tokenizer, data: DataConfig, vocab_size: int) -> _Answered:
    ids = renamed(record, data)
    if ids.get("input_ids") is not None:
        return _of_ids(ids, tokenizer, vocab_size)
    turns = prompt_of(record, data)
    pieces = tokenizer.prompt_of(turns)
    response = _response(record, turns, data)
    if response is None:
        prompt = _flat(encoded(pieces, tokenizer))
        return _Answered(EncodedPrompt(turns, prompt), None, _sample(prompt, [False] * len(prompt)))
    whole = tokenizer.samples_of(conversation(record, data), last_only=True)[-1]
    by_piece = encoded(whole, tokenizer)
    begins_alike = whole[: len(pieces)] == pieces  # then nothing has to be encoded twice
    prompt = _flat(by_piece[: len(pieces)] if begins_alike else encoded(pieces, tokenizer))
    is_target = [piece.is_target for piece, own in zip(whole, by_piece) for _ in own]
    return _Answered(EncodedPrompt(turns, prompt), response, _sample(_flat(by_piece), is_target))


def _response(record: Record, prompt: Prompt, data: DataConfig) -> str | None:
    """The record's answer to its prompt, None where it has none."""
    try:
        before, response = prompt_and_response(record, data)
    except ValueError:
        return None
    return response if list(before) == list(prompt) else None


def _of_ids(record: Record, tokenizer: Tokenizer, vocab_size: int) -> _Answered:
    """Token ids, of which the prompt is all before the first target; texts are what they decode to."""
    sample = sample_of_ids(record, vocab_size)
    ids = sample.tokens.tolist()
    targets = np.flatnonzero(sample.eligible)
    length = int(targets[0]) if len(targets) else len(ids)
    prompt = EncodedPrompt([Message(USER, tokenizer.decode(ids[:length]))], ids[:length])
    return _Answered(prompt, tokenizer.decode(ids[length:]) if len(targets) else None, sample)


def _check(ids: Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    if not ids:
        raise ValueError("the prompt is empty")
    if tokenizer.mask_id in ids:
        raise ValueError(f"the prompt holds the mask token {tokenizer.mask_id}, which clean data cannot hold")
    if max(ids) >= vocab_size:
        raise ValueError(f"a token id is outside the vocabulary of {vocab_size} ids")


def _sample(tokens: list[int], is_target: list[bool]) -> Sample:
    return Sample(np.array(tokens, dtype=np.int32), np.array(is_target, dtype=np.bool_))


def _flat(ids: Sequence[list[int]]) -> list[int]:
    return [token for own in ids for token in own]


def _cut(sample: Sample, length: int) -> Sample:
    return sample._replace(tokens=sample.tokens[:length], eligible=sample.eligible[:length])
