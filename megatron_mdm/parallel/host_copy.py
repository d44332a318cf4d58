"""A tensor's copy on the host that is made while the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Begun when it is made: on CUDA into pinned memory, behind what the present stream has to do already."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        """The copy; waits for the device where it is not there yet."""
        if self._done is not None and not self._done.query():
            self._done.synchronize()
        return self._host
