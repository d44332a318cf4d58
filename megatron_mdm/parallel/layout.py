"""Degrees of parallelism → which rank is what. Works without torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Ranks on a (pipeline, data, tensor) grid, tensor fastest: megatron-core's order 'tp-cp-ep-dp-pp'."""

    tensor: int
    data: int
    pipeline: int = 1

    @classmethod
    def of(cls, world_size: int, tensor: int, pipeline: int) -> Layout:
        assert world_size % (tensor * pipeline) == 0, (world_size, tensor, pipeline)
        return cls(tensor, world_size // (tensor * pipeline), pipeline)

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor % self.data

    def pipeline_rank(self, rank: int) -> int:
        return rank // (self.tensor * self.data)

    def __str__(self) -> str:
        return f"tensor {self.tensor} × pipeline {self.pipeline} × data {self.data} = {self.world_size} ranks"
