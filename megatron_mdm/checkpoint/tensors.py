"""Tensors of a checkpoint as safetensors, independent of the layout that wrote them and of the one that reads them.

One file per (pipeline stage, tensor-parallel rank, writer): tensor t of a stage is written by data-parallel rank t
modulo their number, so that all write at once. A reader puts the tensor-parallel shards together and cuts its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.sharding import sharding_of
from megatron_mdm.parallel.groups import ParallelContext

_FILE = re.compile(r"stage-(\d+)\.tensor-(\d+)-of-(\d+)\.part-(\d+)\.safetensors")


def write_tensors(tensors: Iterable[tuple[str, str, Tensor]], folder: Path, context: ParallelContext) -> None:
    """(name, kind, this tensor-parallel rank's shard) of a stage → this rank's file. Collective."""
    mine: dict[str, Tensor] = {}
    for index, (name, kind, tensor) in enumerate(tensors):
        if index % context.layout.data == context.data_rank:
            mine[f"{name}/{kind}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    shard = f"tensor-{context.tensor_rank:02d}-of-{context.layout.tensor:02d}"
    save_file(mine, str(folder / f"stage-{context.pipeline_rank:02d}.{shard}.part-{context.data_rank:03d}.safetensors"))


class TensorReader:
    """Reads any tensor of a checkpoint, cut for a tensor-parallel rank; memory: one whole tensor at a time."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model = folder, model
        self.places: dict[str, dict[int, Path]] = {}  # key → tensor-parallel rank → file
        self.degree = 0
        for path in sorted(folder.glob("*.safetensors")):
            match = _FILE.fullmatch(path.name)
            if match is None:
                continue
            self.degree = int(match[3])
            try:
                with safe_open(str(path), "pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        self.places.setdefault(key, {})[int(match[2])] = path
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: cannot be read ({error})") from None
        if not self.places:
            raise UserError(f"{folder}: holds no tensors of a checkpoint")

    def read(self, name: str, kind: str, shape: torch.Size, rank: int, degree: int) -> Tensor:
        """The shard, of this shape, that a tensor-parallel rank of another degree holds. float32."""
        key, sharding = f"{name}/{kind}", sharding_of(name)
        files = self.places.get(key)
        if files is None:
            raise UserError(f"{self.folder}: the checkpoint is of another model: it has no '{name}'")
        shards = [self._load(files[source], key) for source in sorted(files)]
        if len(shards) != self.degree:
            raise UserError(f"{self.folder}: '{name}' has {len(shards)} of {self.degree} tensor-parallel shards")
        whole = sharding.merge(shards)
        full_shape = sharding.full_shape(shape, degree)
        if sharding.is_vocabulary:  # rows of padding depend on the degree
            whole = whole[: self.model.vocab_size]
            whole = torch.cat([whole, whole.new_zeros(full_shape[0] - len(whole), *whole.shape[1:])])
        if whole.shape != full_shape:
            raise UserError(f"{self.folder}: '{name}' has shape {list(whole.shape)}, the model's is {list(full_shape)}")
        return sharding.shard(whole, rank, degree).contiguous()

    @staticmethod
    def _load(path: Path, key: str) -> Tensor:
        with safe_open(str(path), "pt") as file:
            return file.get_tensor(key)
