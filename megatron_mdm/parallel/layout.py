"""Degrees of parallelism → which rank is what. Works without torch.distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mdm.config.schema import ParallelConfig

# The ranks' grid, the last axis fastest: megatron-core's order "tp-cp-ep-dp-pp", read from behind. Context and expert
# parallelism have degree 1 for now.
AXES = ("pipeline", "data", "expert", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has, and where on the grid a rank is. The one source of both: made from the
    configuration, and everything else from it."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @classmethod
    def of(cls, world_size: int, parallel: ParallelConfig) -> Layout:
        """The layout of a job's ranks; what tensor and pipeline leave over is data-parallel. They must divide the job:
        config/validate.py says so to users."""
        fixed = cls(tensor=parallel.tensor, pipeline=parallel.pipeline)
        assert world_size % fixed.world_size == 0, (world_size, parallel)
        return cls(tensor=parallel.tensor, data=world_size // fixed.world_size, pipeline=parallel.pipeline)

    @property
    def world_size(self) -> int:
        return math.prod(self.degree(axis) for axis in AXES)

    def degree(self, axis: str) -> int:
        return int(getattr(self, axis))

    def index(self, rank: int, axis: str) -> int:
        """A rank's place along an axis."""
        return rank // self.stride(axis) % self.degree(axis)

    def stride(self, axis: str) -> int:
        """What neighbours along an axis differ by."""
        return math.prod(self.degree(faster) for faster in AXES[AXES.index(axis) + 1 :])

    def peers(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from a rank along an axis alone, in order: its group there."""
        first = rank - self.index(rank, axis) * self.stride(axis)
        return [first + place * self.stride(axis) for place in range(self.degree(axis))]

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
