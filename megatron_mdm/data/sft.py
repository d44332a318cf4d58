"""Supervised fine-tuning samples: prompts and responses, conversations, or token ids."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import Prompt, conversation, renamed
from megatron_mdm.data.conversation import USER, Message, Piece
from megatron_mdm.data.corpus import blend_counts
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.records import BadRecords, all_or_none, read_records
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.diffusion.randomness import Purpose, stream

_RECORDS_AT_ONCE = 1024  # that the tokenizer is given
_IGNORED_LABEL = -100  # a label, as torch's and transformers' losses skip it

Set = TypeVar("Set", bound="SftDataset")


@dataclass(frozen=True)
class SftDataset:
    """Tokenised samples in memory, in the file's order."""

    samples: Sequence[Sample]
    num_too_long: int  # left out, or cut: longer than max_length
    fingerprint: str  # sha256 of the file, or of the samples
    num_bad: int = 0  # left out: not readable
    first_bad: tuple[str, ...] = ()  # where some of them are, and what is wrong
    records: Sequence[int] = ()  # of each sample; empty: every sample is a record of its own

    BY_ROW: ClassVar[tuple[str, ...]] = ("samples", "records")  # fields with an entry for every row

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

    def subset(self: Set, rows: Sequence[int] | NDArray[np.int64]) -> Set:
        """These rows; what was left out in reading is not said of them."""
        by_row = [name for name in self.BY_ROW if getattr(self, name)]
        taken: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in by_row}
        return replace(self, **taken, num_too_long=0, num_bad=0, first_bad=())


def read_sft(path: str, tokenizer: Tokenizer, data: DataConfig, vocab_size: int) -> SftDataset:
    """Read a file of JSON or parquet, or a `datasets` name, in any of the forms that README.md lists.

    Raises UserError with the line of the first bad record, unless data.on_error says to skip them; then they are
    counted.
    """
    bad = BadRecords(data.on_error)
    samples: list[Sample] = []
    records: list[int] = []
    num_too_long = 0
    for record, where, sample in _tokenised(path, tokenizer, data, vocab_size, bad):
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
                samples.append(
                    sample._replace(
                        tokens=sample.tokens[: data.max_length], eligible=sample.eligible[: data.max_length]
                    )
                )
                records.append(record)
    if not samples:
        raise UserError(
            f"{path}: no sample left; {num_too_long} longer than 'data.max_length' {data.max_length}{bad.summary()}"
        )
    fingerprint = sha256(Path(path)) if Path(path).is_file() else contents(samples)
    records = records if len(set(records)) < len(records) else []
    return SftDataset(samples, num_too_long, fingerprint, bad.count, tuple(bad.first), records)


def contents(samples: Sequence[Sample]) -> str:
    """sha256 of the samples, where the data are no file."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.int64(len(sample.tokens)).tobytes() + sample.tokens.tobytes() + sample.eligible.tobytes())
    return digest.hexdigest()


def blended(sets: Sequence[Set], weights: Sequence[float]) -> Set:
    """One set of several: an epoch shows every sample of the set that lasts longest once, and of the others as their
    weights ask, several times where they are few. The mean over samples is then Σ weight · loss / Σ weight.
    """
    if len(sets) == 1:
        return sets[0]
    counts = blend_counts([len(part) for part in sets], weights)
    parts = [replace(part, records=()).subset(np.arange(count) % len(part)) for part, count in zip(sets, counts)]
    return replace(
        parts[0],
        **{name: [row for part in parts for row in getattr(part, name)] for name in parts[0].BY_ROW},
        num_too_long=sum(part.num_too_long for part in sets),
        fingerprint=_together([part.fingerprint for part in sets]),
        num_bad=sum(part.num_bad for part in sets),
        first_bad=tuple(place for part in sets for place in part.first_bad),
    )


def joined(sets: Sequence[Set]) -> Set:
    """One set of several, each sample once."""
    return blended(sets, [len(part) for part in sets])


def _together(fingerprints: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def split_validation(data: Set, fraction: float, seed: int) -> tuple[Set, Set]:
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


def encode_prompt(prompt: str | Prompt, tokenizer: Tokenizer) -> list[int]:
    """What stands before a response, in the tokenizer's template. prompt: a text, or the turns so far."""
    turns = [Message(USER, prompt)] if isinstance(prompt, str) else prompt
    try:
        pieces = tokenizer.prompt_of(turns)
    except ValueError as error:
        raise UserError(f"the prompt {turns[-1].content[:40]!r}: {error}") from None
    return [token for own in encoded(pieces, tokenizer) for token in own]


def encoded(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each piece, with the end token that it may have."""
    return [_ended(piece, own, tokenizer.eos_id) for piece, own in zip(pieces, tokenizer.ids_of(pieces))]


class _Draft(NamedTuple):
    """A sample on its way: either texts that are to be tokenised, or a sample."""

    record: int
    where: str
    content: Sample | list[Piece]


def _tokenised(
    path: str, tokenizer: Tokenizer, data: DataConfig, vocab_size: int, bad: BadRecords
) -> Iterator[tuple[int, str, Sample]]:
    drafts = _drafts(path, tokenizer, data, vocab_size, bad)
    while batch := list(islice(drafts, _RECORDS_AT_ONCE)):
        pieces = [piece for draft in batch if isinstance(draft.content, list) for piece in draft.content]
        together = all_or_none(partial(tokenizer.ids_of, pieces)) if pieces else []
        ids = iter(together or [])
        for record, where, content in batch:
            with bad.of(where):
                if isinstance(content, Sample):
                    yield record, where, content
                    continue
                own = ids if together is not None else iter(tokenizer.ids_of(content))
                yield record, where, _joined(content, own, tokenizer.eos_id)


def _drafts(path: str, tokenizer: Tokenizer, data: DataConfig, vocab_size: int, bad: BadRecords) -> Iterator[_Draft]:
    for number, (where, record) in enumerate(read_records(path, bad)):
        with bad.of(where):
            ids = renamed(record, data)
            if ids.get("input_ids") is not None:
                yield _Draft(number, where, sample_of_ids(ids, vocab_size))
                continue
            turns = conversation(record, data)
            for pieces in tokenizer.samples_of(turns, last_only=data.eligible_turns == "last"):
                yield _Draft(number, where, pieces)


def _joined(pieces: list[Piece], ids: Iterator[list[int]], eos_id: int) -> Sample:
    tokens: list[int] = []
    eligible: list[bool] = []
    for piece in pieces:
        own = _ended(piece, next(ids), eos_id)
        tokens += own
        eligible += [piece.is_target] * len(own)
    return Sample(np.array(tokens, dtype=np.int32), np.array(eligible, dtype=np.bool_))


def _ended(piece: Piece, ids: list[int], eos_id: int) -> list[int]:
    return [*ids, eos_id] if piece.ends and ids else ids


def sample_of_ids(record: Record, vocab_size: int) -> Sample:
    """A sample of token ids; eligible from prompt_length on, or in 'spans' ([first, end) pairs), or where 'labels' do
    not say -100."""
    ids = _integers(record["input_ids"], "input_ids")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} at position {place} is outside the vocabulary of {vocab_size} ids")
    eligible = np.zeros(len(ids), dtype=np.bool_)
    for first, end in _spans(record, ids):
        if not 0 <= first <= end <= len(ids):
            raise ValueError(f"the span [{first}, {end}] does not fit {len(ids)} 'input_ids'")
        eligible[first:end] = True
    codes_of = record.get("codes_of") or ""
    if not isinstance(codes_of, str):
        raise ValueError(f"'codes_of' must be a text, the image tokenizer's fingerprint, not {codes_of!r}")
    return Sample(np.array(ids, dtype=np.int32), eligible, codes_of=sys.intern(codes_of))


def _spans(record: Record, ids: Sequence[int]) -> list[tuple[int, int]]:
    """[first, end) of the target tokens among token ids."""
    spans, prompt_length, labels = (record.get(name) for name in ("spans", "prompt_length", "labels"))
    if spans is not None:
        if not isinstance(spans, list) or not all(isinstance(span, list) and len(span) == 2 for span in spans):
            raise ValueError("'spans' must be a list of pairs [first, end]")
        return [(first, end) for first, end in (_integers(span, "spans") for span in spans)]
    if prompt_length is not None:
        if type(prompt_length) is not int or not 0 <= prompt_length <= len(ids):
            raise ValueError(f"'prompt_length' {prompt_length!r} is no integer that fits {len(ids)} 'input_ids'")
        return [(prompt_length, len(ids))]
    if labels is None:
        raise ValueError("'input_ids' need 'prompt_length', 'spans' or 'labels', which say which tokens are targets")
    if len(_integers(labels, "labels")) != len(ids):
        raise ValueError(f"{len(labels)} 'labels' do not fit {len(ids)} 'input_ids'")
    targets = [place for place, label in enumerate(labels) if label != _IGNORED_LABEL]
    if wrong := [place for place in targets if labels[place] != ids[place]]:
        raise ValueError(
            f"'labels' differ from 'input_ids' at position {wrong[0]}; they must be the same tokens or -100"
        )
    return [(place, place + 1) for place in targets]


def _integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"'{name}' must hold integers only")
    return value
