"""How the ranks of an axis of the layout divide a parameter, and megatron-core's marks of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_mdm.models.rows import Parameter

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """dim: the split dimension; interleave: equal parts along it that are split each for itself, so that a gated MLP's
    shard is [gate_r; up_r]."""

    dim: int
    interleave: int = 1

    def local_shape(self, full: Shape, degree: int) -> Shape:
        """The shape of one rank's shard. The dimension is a multiple of the degree."""
        return (*full[: self.dim], full[self.dim] // degree, *full[self.dim + 1 :])

    def intervals(self, size: int, rank: int, degree: int) -> list[tuple[int, int]]:
        """[start, stop) along dim of each part of a rank's slice, in order. size: of dim in full."""
        part = size // self.interleave
        length = part // degree
        return [(i * part + rank * length, i * part + (rank + 1) * length) for i in range(self.interleave)]

    def shard(self, full: Tensor, rank: int, degree: int) -> Tensor:
        """The slice of the full tensor that a rank holds."""
        if degree == 1:
            return full
        parts = full.chunk(self.interleave, self.dim)
        return torch.cat([part.chunk(degree, self.dim)[rank] for part in parts], self.dim)

    def merge(self, shards: list[Tensor]) -> Tensor:
        """The full tensor of all ranks' slices, in rank order."""
        if len(shards) == 1:
            return shards[0]
        parts = zip(*(shard.chunk(self.interleave, self.dim) for shard in shards))
        return torch.cat([torch.cat(part, self.dim) for part in parts], self.dim)


def mark_shards(rows: Iterable[tuple[Parameter, Tensor]]) -> None:
    """Set megatron-core's attributes, by which gradient norms count a replicated parameter once per TP group."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes  # single-process tools need none

    for row, tensor in rows:
        split = row.split.get("tensor")
        if split and not hasattr(tensor, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(tensor, True, split.dim, split.interleave)
