"""Degrees of parallelism → which rank is what. Works without torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
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


def partition(costs: Sequence[float], num_parts: int) -> list[int]:
    """Cut a sequence into non-empty runs so that the most expensive is as cheap as possible.

    Returns bounds [num_parts + 1]; part p is [bounds[p], bounds[p + 1]). Of equal cuts, the one with the smallest sum
    of squares, so that the other parts are even, too.
    """
    assert 1 <= num_parts <= len(costs), (len(costs), num_parts)
    totals = [0.0]
    for cost in costs:
        totals.append(totals[-1] + cost)
    # best[end]: (greatest part, sum of squares, bounds) of costs[:end] in the parts so far
    best = {end: (totals[end], totals[end] ** 2, [0, end]) for end in range(1, len(costs) + 1)}
    for part in range(2, num_parts + 1):
        best = {
            end: min(
                (max(worst, totals[end] - totals[cut]), squares + (totals[end] - totals[cut]) ** 2, [*bounds, end])
                for cut, (worst, squares, bounds) in best.items()
                if cut < end
            )
            for end in range(part, len(costs) + 1)
        }
    return best[len(costs)][2]
