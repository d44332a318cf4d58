"""Chunks of raw documents → token ids, in worker processes. Imports no torch: every worker imports this file."""

from __future__ import annotations

import collections
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.documents import Chunk, Position
from megatron_mdm.data.json_files import Record, parse_object
from megatron_mdm.data.records import BadRecords, all_or_none
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer


class Encoded(NamedTuple):
    """The documents of a chunk, one after another."""

    tokens: NDArray[Any]  # [Σ lengths], of the corpus's integer type
    lengths: NDArray[np.int64]  # [documents], end tokens included
    num_bad: int  # documents that are left out
    first_bad: tuple[str, ...]  # "file, line n: what is wrong"
    path: str
    size: int
    following: Position


class Settings(NamedTuple):
    data: DataConfig  # names the tokenizer and its end token
    field: str
    end_token: bool  # behind every document
    dtype: str


def encode_all(chunks: Iterable[Chunk], settings: Settings, num_workers: int) -> Generator[Encoded, None, None]:
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
    bad = BadRecords("skip")
    for message in chunk.bad:
        bad.add(message)
    texts: dict[str, str] = {}  # by where they are, without documents that are blank
    for place, record in zip(chunk.places, chunk.records):
        where = f"{chunk.path}, {place}"
        with bad.of(where):
            text = PARSERS[chunk.parse](record, settings.field)
            tokenizer.literals.check(text)
            if text.strip():
                texts[where] = text
    end = [tokenizer.eos_id] if settings.end_token else []
    tokens: list[int] = []
    lengths: list[int] = []
    for ids in _ids(texts, tokenizer, bad):  # one array for all: an array a document costs a tenth of the time
        tokens += ids
        tokens += end
        lengths.append(len(ids) + len(end))
    arrays = np.array(tokens, dtype=settings.dtype), np.array(lengths, dtype=np.int64)
    return Encoded(*arrays, bad.count, tuple(bad.first), chunk.path, chunk.size, chunk.following)


def _ids(texts: dict[str, str], tokenizer: Tokenizer, bad: BadRecords) -> Iterator[list[int]]:
    """Token ids of every document; each alone where the tokenizer refuses one of them."""
    together = all_or_none(partial(tokenizer.encode_batch, list(texts.values()))) if texts else []
    if together is not None:
        yield from together
        return
    for where, text in texts.items():
        with bad.of(where):
            yield tokenizer.encode(text)


def _from_text(record: bytes, _: str) -> str:
    """Line ends become \\n, as Python reads text."""
    try:
        return record.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {record[error.start]:#04x}, {error.start} bytes in)") from None


def _from_json(record: bytes, field: str) -> str:
    return _from_object(parse_object(record), field) if record.strip() else ""


def _from_object(record: Record, field: str) -> str:
    if field not in record:
        raise ValueError(f"no field '{field}' (found {', '.join(record) or 'none'}); name yours with --field")
    return _from_value(record[field], field)


def _from_value(record: Any, field: str) -> str:
    if isinstance(record, Exception):
        raise record
    if not isinstance(record, str):
        raise ValueError(f"expected a string in the field '{field}', found {type(record).__name__}")
    return record


PARSERS: dict[str, Callable[[Any, str], str]] = {
    "text": _from_text,
    "json": _from_json,
    "object": _from_object,
    "value": _from_value,
}
