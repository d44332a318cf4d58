"""The process group of one rank alone. Its collectives are copies, so it needs no communicator.

NCCL gives one to a group of one rank, too, and with it 512 MiB of the GPU (NVIDIA/nccl#2363), at the first collective;
DeepSpeed calls collectives on groups of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

SINGLE = "single"  # the name of the backend
_ProcessGroup: Any = dist.ProcessGroup  # its types are those of overloaded C++ functions


class SingleRank(_ProcessGroup):
    """What torch.distributed calls on a group, under the names of torch 2.11 to 2.13. Every reduction of one rank's
    values is these values."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # rank and size
        self._name = ""

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return _done()

    allreduce_coalesced = broadcast = reduce = allreduce

    def barrier(self, opts: Any = None) -> Any:
        return _done()

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return _copied([output], [input])

    _allgather_base = reduce_scatter_single = _reduce_scatter_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        return _copied(outputs, inputs)

    allgather_into_tensor_coalesced = reduce_scatter_single_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = alltoall = all_gather_single_coalesced

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        return _copied([of_rank[0] for of_rank in outputs], inputs)

    allgather_coalesced = gather = allgather

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Any:
        return _copied(outputs, [of_rank[0] for of_rank in inputs])

    scatter = reduce_scatter

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> Any:
        return _copied([output], [input])

    alltoall_base = all_to_all_single

    def _start_coalescing(self, device: torch.device) -> None:
        """Nothing is gained by doing several copies at once."""

    def _end_coalescing(self, device: torch.device) -> Any:
        return _done()

    def getBackendName(self) -> str:
        return SINGLE

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name


def _copied(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        for output, given in zip(outputs, inputs, strict=True):
            output.view(-1).copy_(given.reshape(-1))
    return _done()


def _done() -> Any:
    """The handle of an operation that is over."""
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)


dist.Backend.register_backend(SINGLE, lambda *_: SingleRank(), devices=["cpu", "cuda"])
