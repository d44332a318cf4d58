"""Host memory in pieces of one size, filled and written as one run of bytes.

torch's pinned allocator rounds every request up to a power of two: a single buffer may take twice what it holds.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mdm.parallel import platform

PIECE_BYTES = 64 << 20  # a power of two: at most one piece is more than is needed


class Pieces:
    """Bytes 0 … length − 1 over pieces that begin at a page, as direct writes want it; pinned on CUDA, so that copies
    from the device are fast. They are kept when the length changes."""

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        """piece_bytes: a power of two, of pages."""
        self.piece_bytes = piece_bytes
        self.length = 0
        self.pieces: list[Tensor] = []

    def hold(self, length: int) -> None:
        """Have memory for so many bytes."""
        self.length = length
        while len(self.pieces) * self.piece_bytes < length:
            self.pieces.append(_allocate(self.piece_bytes))

    def write(self, position: int, values: Tensor) -> None:
        """Copy a tensor [n] of any type and device to where it begins, a multiple of its element size."""
        size = values.element_size()
        start = 0
        while start < len(values):
            piece, offset = divmod(position + start * size, self.piece_bytes)
            number = min(len(values) - start, (self.piece_bytes - offset) // size)
            place = self.pieces[piece][offset : offset + number * size]
            place.view(values.dtype).copy_(values[start : start + number])
            start += number

    def parts(self) -> Iterator[memoryview]:
        """The bytes in their order."""
        left = self.length
        for piece in self.pieces:
            if left > 0:
                yield piece[:left].numpy().data
            left -= self.piece_bytes


def _allocate(size: int) -> Tensor:
    if platform.is_cuda():
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # what is not written to takes no memory
