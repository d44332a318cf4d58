"""Chunks of raw documents → token ids, in worker processes. Imports no torch: every worker imports this file."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.documents import Chunk, Position
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer


class Encoded(NamedTuple):
    """The documents of a chunk, one after another."""

    tokens: NDArray[Any]  # [Σ lengths], of the corpus's integer type
    lengths: NDArray[np.int64]  # [documents], end tokens included
    bad: list[str]  # "file, line n: what is wrong" of the documents that are left out
    size: int
    following: Position


class Settings(NamedTuple):
    data: DataConfig  # names the tokenizer and its end token
    field: str
    end_token: bool  # behind every document
    dtype: str


def encode_all(chunks: Iterable[Chunk], settings: Settings, num_workers: int) -> Iterator[Encoded]:
    """Every chunk, in order. At most two chunks a worker are under way, so memory does not grow with the corpus."""
    if num_workers == 1:
        _start(settings)
        yield from map(_encode, chunks)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start, (settings,)) as pool:
        waiting: collections.deque[Future[Encoded]] = collections.deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode, chunk))
                if len(waiting) >= 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


_worker: dict[str, Any] = {}  # of this process


def _start(settings: Settings) -> None:
    _worker.update(settings=settings, tokenizer=load_tokenizer(settings.data))


def _encode(chunk: Chunk) -> Encoded:
    settings: Settings = _worker["settings"]
    tokenizer: Tokenizer = _worker["tokenizer"]
    parse = PARSERS[chunk.parse]
    texts, bad, number = [], [], chunk.number
    for record in chunk.records:
        try:
            text = parse(record, settings.field)
            tokenizer.literals.check(text)
            if text.strip():
                texts.append(text)
        except ValueError as error:
            bad.append(f"{chunk.path}, {chunk.unit} {number}: {error}")
        number += record.count(b"\n") + chunk.lines_between if isinstance(record, bytes) else 1
    end = [tokenizer.eos_id] if settings.end_token else []
    tokens: list[int] = []
    lengths: list[int] = []
    for ids in tokenizer.encode_batch(texts):  # one array for all: an array a document costs a tenth of the time
        tokens += ids
        tokens += end
        lengths.append(len(ids) + len(end))
    arrays = np.array(tokens, dtype=settings.dtype), np.array(lengths, dtype=np.int64)
    return Encoded(*arrays, bad, chunk.size, chunk.following)


def _from_text(record: bytes, _: str) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.object[error.start]:#04x}, {error.start} bytes in)") from None


def _from_json(record: bytes, field: str) -> str:
    if not record.strip():
        return ""
    text = _from_text(record, field)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise ValueError(f"expected an object with a string in the field '{field}'")
    return value[field]


def _from_value(record: Any, field: str) -> str:
    if not isinstance(record, str):
        raise ValueError(f"expected a string in the column '{field}', found {type(record).__name__}")
    return record


PARSERS: dict[str, Callable[[Any, str], str]] = {"text": _from_text, "json": _from_json, "value": _from_value}
