"""Tensors of a checkpoint as safetensors, independent of the layout that wrote them and of the one that reads them.

One file per (pipeline stage, tensor-parallel rank, writer): tensor t of a stage is written by data-parallel rank t
modulo their number, so that all write at once. A reader puts the tensor-parallel shards together and cuts its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_mdm.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from megatron_mdm.checkpoint.views import View, cut, merge, read, with_rows
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.sharding import sharding_of
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import beat

WEIGHT = "weight"  # a kind; the others are Adam's moments
_FILE = re.compile(r"stage-(\d+)\.tensor-(\d+)-of-(\d+)\.part-(\d+)\.safetensors")


def write_tensors(tensors: Iterable[tuple[str, str, Tensor]], folder: Path, context: ParallelContext) -> None:
    """(name, kind, this tensor-parallel rank's shard) of a stage → this rank's file. Collective.

    Raises OSError where the file cannot be written, after the last communication.
    """
    mine: dict[str, Tensor] = {}
    for index, (name, kind, tensor) in enumerate(tensors):
        beat()
        if index % context.layout.data == context.data_rank:
            mine[f"{name}/{kind}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(context.pipeline_rank, context.tensor_rank, context.layout.tensor, context.data_rank)
    try:
        save_file(mine, folder / name)
    except SafetensorError as error:  # the library's own wrapping of a failed write
        raise OSError(_cause(error)) from None


def _cause(error: SafetensorError) -> str:
    """The system's words in the library's message, as in: … I/O error: No space left on device (os error 28)"""
    match = re.search(r"([^:]+?) \(os error \d+\)", str(error))
    return match[1].strip() if match else str(error)


def file_name(stage: int, tensor_rank: int, tensor_degree: int, part: int) -> str:
    return f"stage-{stage:02d}.tensor-{tensor_rank:02d}-of-{tensor_degree:02d}.part-{part:03d}.safetensors"


class TensorReader:
    """Reads any tensor of a checkpoint, cut for a tensor-parallel rank; only the bytes of that cut are read."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model = folder, model
        self.places: dict[str, dict[int, StoredTensor]] = {}  # key → tensor-parallel rank → its shard
        self.degree = 0
        for path in sorted(folder.glob("*.safetensors")):
            match = _FILE.fullmatch(path.name)
            if match is None:
                continue
            self.degree = int(match[3])
            for key, tensor in SafetensorsFile(path).tensors.items():
                self.places.setdefault(key, {})[int(match[2])] = tensor
        if not self.places:
            raise UserError(f"{folder}: holds no tensors of a checkpoint")

    def kinds(self) -> set[str]:
        """Weights alone, or moments as well."""
        return {key.rpartition("/")[2] for key in self.places}

    def view(self, name: str, kind: str) -> View:
        """The whole tensor, without the vocabulary's padding, in the type in which it is stored."""
        sharding, shards = sharding_of(name), self.places.get(f"{name}/{kind}")
        if shards is None:
            raise UserError(f"{self.folder}: the checkpoint is of another model: it has no '{name}'")
        if len(shards) != self.degree:
            raise UserError(f"{self.folder}: '{name}' has {len(shards)} of {self.degree} tensor-parallel shards")
        whole = merge([shards[rank] for rank in sorted(shards)], sharding)
        if sharding.is_vocabulary and whole.shape[0] > self.model.vocab_size:
            whole = with_rows(whole, self.model.vocab_size)
        return whole

    def read(self, name: str, kind: str, shape: torch.Size, rank: int, degree: int) -> Tensor:
        """The shard, of this shape, that a tensor-parallel rank of another degree holds. float32."""
        beat()
        whole, sharding = self.view(name, kind), sharding_of(name)
        full_shape = sharding.full_shape(shape, degree)
        if sharding.is_vocabulary:  # rows of padding depend on the degree
            whole = with_rows(whole, full_shape[0])
        if tuple(whole.shape) != tuple(full_shape):
            raise UserError(f"{self.folder}: '{name}' has shape {list(whole.shape)}, the model's is {list(full_shape)}")
        return read(cut(whole, sharding, rank, degree), torch.float32)
