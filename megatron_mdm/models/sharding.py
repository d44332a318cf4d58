"""How each parameter is split over tensor-parallel ranks: one table for initialisation, checkpoints and conversion."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """dim: the split dimension, −1 where every rank holds the whole; interleave: equal parts along dim that are split
    each for itself, so that a gated MLP's shard is [gate_r; up_r]."""

    dim: int
    interleave: int = 1
    is_vocabulary: bool = False  # rows are padded to a multiple that depends on the degree

    def full_shape(self, local: torch.Size, degree: int) -> torch.Size:
        shape = list(local)
        if self.dim >= 0:
            shape[self.dim] *= degree
        return torch.Size(shape)

    def intervals(self, size: int, rank: int, degree: int) -> list[tuple[int, int]]:
        """Where along dim, of this size in full, the slice of a rank lies: [start, stop) of each part, in order."""
        part = size // self.interleave
        length = part // degree
        return [(i * part + rank * length, i * part + (rank + 1) * length) for i in range(self.interleave)]

    def shard(self, full: Tensor, rank: int, degree: int) -> Tensor:
        """The slice of the full tensor that a rank holds."""
        if self.dim < 0 or degree == 1:
            return full
        parts = full.chunk(self.interleave, self.dim)
        return torch.cat([part.chunk(degree, self.dim)[rank] for part in parts], self.dim)

    def merge(self, shards: list[Tensor]) -> Tensor:
        """The full tensor of all ranks' slices, in rank order."""
        if self.dim < 0 or len(shards) == 1:
            return shards[0]
        parts = zip(*(shard.chunk(self.interleave, self.dim) for shard in shards))
        return torch.cat([torch.cat(part, self.dim) for part in parts], self.dim)


_SHARDINGS = (
    (r"\.word_embeddings\.weight$", Sharding(0, is_vocabulary=True)),
    (r"\.vocabulary_weight$", Sharding(0, is_vocabulary=True)),
    (r"\.linear_qkv\.(weight|bias)$", Sharding(0)),  # per kv group [q…q, k, v]: splits by group
    (r"\.linear_fc1\.weight$", Sharding(0, interleave=2)),  # [gate; up]
    (r"\.linear_(proj|fc2)\.weight$", Sharding(1)),
    (r"(norm\.weight|\.layer_norm_weight)$", Sharding(-1)),
)
HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")  # whole on every rank, which has some of the heads


def sharding_of(name: str) -> Sharding:
    """The sharding of a parameter of models/layers.py, by its name."""
    for pattern, sharding in _SHARDINGS:
        if re.search(pattern, name):
            return sharding
    raise KeyError(f"no sharding rule for parameter {name}")


def mark_shards(model: torch.nn.Module) -> None:
    """Set megatron-core's attributes, by which gradient norms count a replicated parameter once per TP group."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes  # single-process tools need none

    for name, parameter in model.named_parameters():
        sharding = sharding_of(name)
        if sharding.dim >= 0 and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, sharding.dim, sharding.interleave)
