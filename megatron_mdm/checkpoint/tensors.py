"""Tensors of a checkpoint as safetensors, independent of the layout that wrote them and of the one that reads them.

One file per (pipeline stage, tensor-parallel rank, data-parallel rank) with what that rank holds: ZeRO's partitions as
they are, so that nothing is communicated. A reader puts fragments and tensor-parallel shards together and cuts its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mdm.checkpoint.direct_writer import write_memory
from megatron_mdm.checkpoint.lazy_tensors import Flat, LazyTensor, cut, merge, read, with_padding, with_rows
from megatron_mdm.checkpoint.manifest import FORMAT, TENSORS, format_of
from megatron_mdm.checkpoint.pieces import Pieces
from megatron_mdm.checkpoint.safetensors_file import METADATA, SafetensorsFile, StoredTensor, header_bytes
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.parameters import Parameter, parameter_table
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import beat

if TYPE_CHECKING:
    from megatron_mdm.engine.optimizer_state import Fragment  # brings DeepSpeed, which single-process tools do without

WEIGHT = "weight"  # a kind; the others are Adam's moments
FRAGMENTS = "fragments"  # in a file's metadata: key → [start, *shape of the shard that it is a part of]
_FILE = re.compile(r"stage-(\d+)\.tensor-(\d+)-of-(\d+)\.part-(\d+)\.safetensors")


# Format → the name under which a checkpoint of that format holds a parameter.
STORED_NAMES: dict[int, Callable[[Parameter], str]] = {1: lambda row: row.drawn_by, FORMAT: lambda row: row.name}


class Snapshot:
    """The file that this rank adds to a checkpoint, in memory: training continues while it is written.

    The memory, 12 bytes for each parameter that this rank's optimizer holds, is kept for the next save.
    """

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        self.memory = Pieces()

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy what this rank is to write. The only part of a save that training waits for."""
        mine = sorted(self._share(fragments), key=_key)
        places = {_key(f): [f.start, *f.shape] for f in mine if f.values.numel() != math.prod(f.shape)}
        shapes = {_key(f): (f.values.numel(),) if _key(f) in places else tuple(f.shape) for f in mine}
        tensors = {_key(f): (f.values.dtype, shapes[_key(f)]) for f in mine}
        metadata = {**METADATA, FRAGMENTS: json.dumps(places)} if places else METADATA
        header = header_bytes(tensors, metadata)
        self.memory.hold(len(header) + sum(fragment.values.nbytes for fragment in mine))
        self.memory.write(0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        position = len(header)
        for fragment in mine:
            self.memory.write(position, fragment.values)
            position += fragment.values.nbytes

    def write(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """(name, manifest entry) of the file, which is on the disk. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        context = self.context
        name = file_name(context.pipeline_rank, context.tensor_rank, context.layout.tensor, context.data_rank)
        content = list(self.memory.parts())
        with ThreadPoolExecutor(1) as hasher:
            digest = hasher.submit(_sha256, content)
            write_memory(folder / name, content)
            return name, {"bytes": self.memory.length, "sha256": digest.result()}

    def _share(self, fragments: Iterable[Fragment]) -> Iterable[Fragment]:
        """The fragments that this rank writes: an equal part of what all data-parallel ranks hold alike."""
        rank = self.context.data_rank
        ranks = self.context.layout.data
        for fragment in fragments:
            if fragment.is_replicated and ranks > 1:
                size = fragment.values.numel()
                start = size * rank // ranks
                stop = size * (rank + 1) // ranks
                fragment = fragment._replace(start=start, values=fragment.values[start:stop])
            if fragment.values.numel():
                yield fragment


def _sha256(content: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def _key(fragment: Fragment) -> str:
    return f"{fragment.name}/{fragment.kind}"


def file_name(stage: int, tensor_rank: int, tensor_degree: int, part: int) -> str:
    return f"stage-{stage:02d}.tensor-{tensor_rank:02d}-of-{tensor_degree:02d}.part-{part:03d}.safetensors"


class TensorReader:
    """Reads any tensor of a checkpoint, cut for a tensor-parallel rank; only the bytes of that cut are read."""

    def __init__(self, folder: Path, model: ModelConfig, version: int = FORMAT) -> None:
        """version: the checkpoint's format."""
        self.folder = folder
        self.table = parameter_table(model)
        self.stored_name = STORED_NAMES[version]
        found: dict[tuple[str, int], list[tuple[int, tuple[int, ...], StoredTensor]]] = {}
        self.degree = 0
        for path in sorted(folder.glob("*.safetensors")):
            match = _FILE.fullmatch(path.name)
            if match is None:
                continue
            self.degree = int(match[3])
            file = SafetensorsFile(path)
            fragments = json.loads(file.metadata.get(FRAGMENTS, "{}"))
            for key, tensor in file.tensors.items():
                start, *shape = fragments.get(key, [0, *tensor.shape])
                found.setdefault((key, int(match[2])), []).append((start, tuple(shape), tensor))
        self.places: dict[str, dict[int, LazyTensor]] = {}  # key → tensor-parallel rank → its shard
        for (key, rank), parts in found.items():
            self.places.setdefault(key, {})[rank] = self._put_together(key, sorted(parts, key=lambda part: part[0]))
        if not self.places:
            raise UserError(f"{folder}: holds no tensors of a checkpoint")

    @classmethod
    def of(cls, checkpoint: Path, model: ModelConfig) -> TensorReader:
        """The reader of a checkpoint in its own format."""
        return cls(checkpoint / TENSORS, model, format_of(checkpoint))

    def _put_together(self, key: str, parts: list[tuple[int, tuple[int, ...], StoredTensor]]) -> LazyTensor:
        """The shard of these parts: (start, shape of the whole, elements), by start."""
        (_, shape, first), position = parts[0], 0
        for start, _, tensor in parts:
            if start != position:
                raise UserError(f"{self.folder}: '{key}' is incomplete: no file has its element {position}")
            position += math.prod(tensor.shape)
        if position != math.prod(shape):
            raise UserError(f"{self.folder}: '{key}' is incomplete: no file has its element {position}")
        return first if len(parts) == 1 else Flat([tensor for _, _, tensor in parts], shape)

    def kinds(self) -> set[str]:
        """The kinds of tensors that the checkpoint holds: weights alone, or moments as well."""
        return {key.rpartition("/")[2] for key in self.places}

    def tensor(self, name: str, kind: str) -> LazyTensor:
        """The whole tensor, without the vocabulary's padding, in the type in which it is stored."""
        row = self.table[name]
        shards = self.places.get(f"{self.stored_name(row)}/{kind}")
        if shards is None:
            raise UserError(f"{self.folder}: the checkpoint is of another model: it has no '{name}/{kind}'")
        if len(shards) != self.degree:
            raise UserError(f"{self.folder}: '{name}' has {len(shards)} of {self.degree} tensor-parallel shards")
        whole = merge([shards[rank] for rank in sorted(shards)], row.split.get("tensor"))
        return with_rows(whole, min(whole.shape[0], row.shape[0])) if row.is_vocabulary else whole

    def shard(self, name: str, kind: str, rank: int, degree: int) -> LazyTensor:
        """The shard that a tensor-parallel rank of another degree holds, of which nothing has been read yet."""
        beat()
        row = self.table[name]
        whole = with_padding(self.tensor(name, kind), row, degree)
        shape = row.padded_shape(degree)
        if tuple(whole.shape) != shape:
            raise UserError(f"{self.folder}: '{name}' has shape {list(whole.shape)}, the model's is {list(shape)}")
        return cut(whole, row.split.get("tensor"), rank, degree)

    def read(self, name: str, kind: str, rank: int, degree: int) -> Tensor:
        """The shard that a tensor-parallel rank of another degree holds. float32."""
        return read(self.shard(name, kind, rank, degree), torch.float32)
