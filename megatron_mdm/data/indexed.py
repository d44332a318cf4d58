"""One shard of a corpus: a .bin of token ids and its .idx, checked against each other, then read through megatron-core.

megatron-core's reader asserts or fails later; what a user can mend is said here, in one line.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.data.tokenizer_folder import tokenizer_fingerprint

_HEADER = b"MMIDIDX\x00\x00"
_HEADER_SIZE = 34  # header 9, version 8, type 1, sequences 8, documents 8
_CHECKED_TOKENS = 4_000_000  # of a shard, when it is opened; every sample is checked again when it is read


@dataclass(frozen=True)
class Shard:
    prefix: str
    indexed: IndexedDataset
    offsets: NDArray[np.int64]  # [D]: bytes before each document
    lengths: NDArray[np.int64]  # [D]: tokens of each document
    readable: NDArray[np.bool_]  # [D]: not empty, and inside the .bin
    fingerprint: str

    def read(self, document: int, offset: int, count: int) -> NDArray[np.int32]:
        """Tokens of a document from an offset on."""
        dtype = self.indexed.index.dtype
        place = int(self.offsets[document]) + offset * self.indexed.index.dtype_size
        return self.indexed.bin_reader.read(dtype=dtype, count=count, offset=place).astype(np.int32)


def is_corpus(prefix: str) -> bool:
    """Whether files of a corpus have this prefix."""
    path = Path(prefix)
    return Path(f"{prefix}.idx").exists() or any(path.parent.glob(f"{path.name}-{'[0-9]' * 5}.idx"))


def find_shards(prefix: str) -> list[str]:
    """PREFIX itself, or PREFIX-00000, PREFIX-00001, …"""
    if Path(f"{prefix}.idx").exists() or Path(f"{prefix}.bin").exists():
        return [prefix]
    path = Path(prefix)
    found = sorted(path.parent.glob(f"{path.name}-{'[0-9]' * 5}.idx")) if path.parent.is_dir() else []
    if not found:
        raise UserError(f"{prefix}: no corpus here (neither {path.name}.idx nor {path.name}-00000.idx)")
    return [str(file.with_suffix("")) for file in found]


def open_shards(
    prefixes: Sequence[str], tokenizer_path: str, vocab_size: int, skip_bad: bool
) -> tuple[list[Shard], int]:
    """(shards, documents and whole shards left out). Raises UserError where one cannot be read and is not to be
    skipped, and where nothing is left."""
    shards = []
    num_bad = 0
    for prefix in prefixes:
        _check_tokenizer(prefix, tokenizer_path)
        try:
            shard = open_shard(prefix, allow_truncated=skip_bad)
        except UserError:
            if not skip_bad:
                raise
            num_bad += 1
            continue
        num_bad += int(np.count_nonzero(~shard.readable & (shard.lengths > 0)))
        _check_vocabulary(shard, vocab_size)
        shards.append(shard)
    if not shards or not any(shard.readable.any() for shard in shards):
        raise UserError(f"{prefixes[0]}: the corpus is empty ({num_bad} shards or documents could not be read)")
    return shards, num_bad


def open_shard(prefix: str, allow_truncated: bool = False) -> Shard:
    """Raises UserError where .idx and .bin do not fit each other; allow_truncated: documents behind the end of the .bin
    are marked as not readable instead."""
    sequences, documents = _check_index(prefix)
    try:
        actual = Path(f"{prefix}.bin").stat().st_size
    except OSError as error:
        raise UserError(f"{prefix}.bin: cannot be read ({error.strerror})") from None
    if actual == 0:
        raise UserError(f"{prefix}.bin: is empty")
    damaged = UserError(f"{prefix}.idx: its documents do not match its {sequences:,} sequences; the file is damaged")
    try:
        indexed = IndexedDataset(prefix, mmap=True)
    except AssertionError:  # the last document does not end with the last sequence
        raise damaged from None
    index = indexed.index
    bounds = index.document_indices.astype(np.int64)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any() or documents != len(bounds):
        raise damaged
    totals = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
    lengths = np.diff(totals[bounds])
    offsets = totals[bounds[:-1]] * index.dtype_size
    expected = int(totals[-1]) * index.dtype_size
    if sequences and int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size != expected:
        raise UserError(f"{prefix}.idx: its pointers do not match its lengths; the file is damaged")
    ends = offsets + lengths * index.dtype_size
    if actual > expected:
        raise UserError(f"{prefix}.idx does not fit its .bin: it describes {expected:,} bytes, the .bin has {actual:,}")
    if actual < expected and not allow_truncated:
        first = int(np.argmax(ends > actual))
        raise UserError(
            f"{prefix}.bin: truncated or of another .idx: {actual:,} bytes of {expected:,}; document {first} of "
            f"{len(lengths):,} is the first that is cut off"
        )
    return Shard(prefix, indexed, offsets, lengths, (ends <= actual) & (lengths > 0), _fingerprint(prefix, actual))


def _check_index(prefix: str) -> tuple[int, int]:
    """(sequences, document bounds) of an .idx whose header and size are right."""
    path = Path(f"{prefix}.idx")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER_SIZE)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(head) < _HEADER_SIZE or not head.startswith(_HEADER):
        raise UserError(f"{path}: not an index of Megatron's (its first bytes are wrong)")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in {dtype.value for dtype in DType}:
        raise UserError(f"{path}: version {version}, type {code}: not an index that megatron-core can read")
    expected = _HEADER_SIZE + sequences * 12 + documents * 8
    if size not in (expected, expected + sequences):  # the latter with the modes of multimodal data
        raise UserError(f"{path}: truncated or damaged: {size:,} bytes, its header describes {expected:,}")
    if documents < 1:
        raise UserError(f"{path}: holds no documents")
    return sequences, documents


def _check_tokenizer(prefix: str, tokenizer_path: str) -> None:
    """Raise UserError where the corpus was made with another tokenizer, as its summary says."""
    base = prefix[:-6] if prefix[-6:-5] == "-" and prefix[-5:].isdigit() else prefix
    summary = Path(f"{base}.json")
    if not (tokenizer_path and summary.exists()):
        return
    try:
        made_with = json.loads(summary.read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a summary of ours
    if made_with != tokenizer_fingerprint(tokenizer_path):
        raise UserError(
            f"{summary}: the corpus was made with another tokenizer than {tokenizer_path} ('data.tokenizer'); prepare "
            "it again, or name that tokenizer"
        )


def _check_vocabulary(shard: Shard, vocab_size: int) -> None:
    """Raise UserError where an id of the first documents lies outside the vocabulary."""
    size = min(_CHECKED_TOKENS, int(shard.lengths[shard.readable].sum()))
    index = shard.indexed.index
    tokens = shard.indexed.bin_reader.read(dtype=index.dtype, count=size, offset=0)
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        document = int(np.searchsorted(np.cumsum(shard.lengths), wrong[0], side="right"))
        raise UserError(
            f"{shard.prefix}.bin, document {document}: token id {tokens[wrong[0]]} is outside the vocabulary of "
            f"{vocab_size} ids; it was made with another tokenizer"
        )


def _fingerprint(prefix: str, size: int) -> str:
    """sha256 of the .idx, and of the .bin's size, first and last megabyte: corpora are too large to read at a start."""
    digest = hashlib.sha256(f"{sha256(Path(f'{prefix}.idx'))} {size}".encode())
    with Path(f"{prefix}.bin").open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()
