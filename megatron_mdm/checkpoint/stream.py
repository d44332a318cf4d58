"""Lazy tensors → safetensors files, one block at a time: resumable, and hashed as they are written.

While one thread reads and converts a block, others hash and write the ones before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mdm.checkpoint.direct_writer import DirectWriter
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, blocks, num_bytes
from megatron_mdm.checkpoint.safetensors_file import METADATA, NAMES, file_order, header_bytes, is_finite
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256, write_json
from megatron_mdm.parallel.progress import progress_bar

JOURNAL = "journal.json"
_WAITING_BLOCKS = 3  # read, and not yet hashed and written
Entry = dict[str, Any]  # bytes, sha256


class Output(NamedTuple):
    """A tensor to write."""

    tensor: LazyTensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.tensor, self.dtype)


@dataclass(frozen=True)
class OutputFile:
    path: str  # relative to the folder that is written
    tensors: dict[str, Output]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.tensors.values())


def write_files(files: list[OutputFile], folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Entry]:
    """Write files below a folder; those that an interrupted call with the same fingerprint finished are kept.

    Returns size and sha256 of each by its path. The journal of what is finished stays in the folder until the caller
    removes it. Raises UserError naming a tensor that cannot be read.
    """
    described = {"inputs": dict(fingerprint), "outputs": _describe(files)}
    identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    finished = _finished(folder, identity)
    bar = progress_bar(
        total=sum(file.num_bytes for file in files), unit="B", unit_scale=True, unit_divisor=1024, desc=folder.name
    )
    with bar, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        for file in files:
            if file.path in finished:
                bar.update(file.num_bytes)
                continue
            finished[file.path] = _write(file, folder, (hasher, writer), bar)
            write_json(folder / JOURNAL, {"identity": identity, "files": finished})
    return {file.path: finished[file.path] for file in files}


def split(outputs: Iterable[tuple[str, Output]], max_bytes: int) -> list[dict[str, Output]]:
    """Tensors in their order, in groups of at most so many bytes (a single larger tensor is a group of its own)."""
    groups: list[dict[str, Output]] = []
    used = 0
    for name, output in outputs:
        if not groups or used + output.num_bytes > max_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = output
        used += output.num_bytes
    return groups


def _write(file: OutputFile, folder: Path, workers: tuple[ThreadPoolExecutor, ThreadPoolExecutor], bar: Any) -> Entry:
    """One file, under a temporary name until it is whole and on disk. workers: one that hashes, one that writes."""
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    specifications = {name: (output.dtype, output.tensor.shape) for name, output in file.tensors.items()}
    order = file_order(specifications)
    digest = hashlib.sha256()
    pending = deque[Future[Any]]()
    with closing(DirectWriter(temporary)) as output:
        header = memoryview(header_bytes({name: specifications[name] for name in order}, METADATA))
        for data in itertools.chain([header], _blocks(file, order)):
            pending.extend(worker.submit(job, data) for worker, job in zip(workers, (digest.update, output.write)))
            _wait(pending, path, 2 * _WAITING_BLOCKS)
            bar.update(len(data) if data is not header else 0)
        _wait(pending, path, 0)
        output.finish()
    temporary.replace(path)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _blocks(file: OutputFile, order: list[str]) -> Iterator[memoryview]:
    for name in order:
        tensor, dtype = file.tensors[name]
        for block in blocks(tensor, dtype):
            if dtype != tensor.dtype and not is_finite(block):
                raise UserError(f"'{name}' holds values that are too great for {NAMES[dtype]}; choose another --dtype")
            yield block.view(-1).view(torch.uint8).numpy().data


def _wait(pending: deque[Future[Any]], path: Path, most: int) -> None:
    """Wait until at most so many jobs are left, which bounds the blocks in memory."""
    try:
        while len(pending) > most:
            pending.popleft().result()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _finished(folder: Path, identity: str) -> dict[str, Entry]:
    """Files of an earlier call that are what its journal says."""
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if journal.get("identity") != identity:
        print(f"{folder}: left by a conversion of other files or options; starting from scratch", flush=True)
        return {}
    intact = {name: entry for name, entry in journal["files"].items() if _is_intact(folder / name, entry)}
    print(f"{folder}: resumes; {len(intact)} finished files are kept", flush=True)
    return intact


def _is_intact(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def _describe(files: list[OutputFile]) -> dict[str, Any]:
    return {
        file.path: {name: [NAMES[output.dtype], list(output.tensor.shape)] for name, output in file.tensors.items()}
        for file in files
    }
