"""The few collectives that the stack itself calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext


def fill_from_data_ranks(values: NDArray[np.float64], context: ParallelContext) -> NDArray[np.float64]:
    """Combine an array of which every data-parallel rank has filled in its own entries, zeros elsewhere.

    The sum x + 0 + … + 0 is exact, so the result is bit-identical for every number of ranks.
    """
    if context.layout.data == 1:
        return values
    tensor = torch.from_numpy(np.array(values, dtype=np.float64))
    dist.all_reduce(tensor, group=context.host_data or context.data_group)
    return tensor.numpy()


def gather_objects(value: object, context: ParallelContext, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One JSON-like object of every rank, in rank order, on every rank. group: of all ranks; None: the default one."""
    gathered: list[object] = [None] * context.layout.world_size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def largest(value: int) -> int:
    """The greatest of the ranks' values, on every rank."""
    tensor = torch.tensor(value, device=platform.device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def barrier() -> None:
    dist.barrier(device_ids=[platform.device().index] if platform.is_cuda() else None)
