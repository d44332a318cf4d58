"""One safetensors file, read and written piece by piece with plain system calls.

Mapped files would count as resident memory as far as they have been read; here memory is what a caller asks for.
Format: 8 bytes length of the header, the header (JSON: name → dtype, shape, offsets), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.config.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
METADATA = {"format": "pt"}  # what the libraries write and some readers ask for
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of the exponent, without the sign bit, shifted up by one: infinities and NaNs have no less.
_NOT_FINITE = {"F64": 0xFFE0 << 48, "F32": 0xFF00 << 16, "F16": 0xF800, "BF16": 0xFF00}
_SCRATCH_ELEMENTS = 4 * 1024 * 1024  # of conversions, at a time
_AHEAD_BYTES = 16 * 1024 * 1024
_LINES = 256  # of a call; the system takes 1024 buffers
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class SafetensorsFile:
    """The tensors of a file, whose header has been checked against the file's length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file.fileno())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def _read_header(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise UserError(f"{self.path}: not a safetensors file")
        if size < 8 + length:
            raise UserError(f"{self.path}: the file is truncated: {size} bytes, its header alone has {8 + length}")
        try:
            header = json.loads(os.pread(descriptor, length, 8))
            self.metadata = header.pop("__metadata__", {})
            entries = [
                (name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path}: not a safetensors file (its header cannot be read)") from None
        end = 8 + length + max((stop for *_, stop in entries), default=0)
        if size != end:
            kind = "truncated" if size < end else "too long"
            raise UserError(f"{self.path}: the file is {kind}: {size} bytes, its header tells of {end}")
        for name, dtype, shape, start, stop in entries:
            if dtype not in DTYPES:
                raise UserError(f"{self.path}: '{name}' has the unsupported type {dtype} (only {', '.join(DTYPES)})")
            if stop - start != math.prod(shape) * DTYPES[dtype].itemsize or not 0 <= start <= stop:
                raise UserError(
                    f"{self.path}: '{name}' has {stop - start} bytes, which do not fit its shape {list(shape)}"
                )
            self.tensors[name] = StoredTensor(self.path, name, DTYPES[dtype], shape, 8 + length + start)


class StoredTensor:
    """A tensor on disk. As a matrix, it has shape[0] rows; see checkpoint/lazy_tensors.py for the interface."""

    def __init__(self, path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.path = path
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.offset = offset
        self.window = -1  # the last part of the file that was asked for ahead

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        """Fill out [r, c] of any dtype on the CPU, with adjacent columns, from this row and column on.

        Raises UserError naming the tensor where a value is infinite or not a number.
        """
        if out.dtype == self.dtype:
            self._read(out, row, column)
            return
        step = max(1, _SCRATCH_ELEMENTS // max(1, out.shape[1]))
        for start in range(0, len(out), step):
            part = out[start : start + step]
            scratch = torch.empty(part.shape, dtype=self.dtype)
            self._read(scratch, row + start, column)
            part.copy_(scratch)

    def _read(self, out: Tensor, row: int, column: int) -> None:
        num_columns = math.prod(self.shape[1:])
        size = self.dtype.itemsize
        offset = self.offset + (row * num_columns + column) * size
        with self.path.open("rb", buffering=0) as file:  # not kept open: a checkpoint may have thousands of files
            self._read_ahead(file.fileno(), offset)
            if out.is_contiguous() and out.shape[1] == num_columns:
                self._fill(file.fileno(), out.view(-1).view(torch.uint8).numpy(), offset)
            else:
                self._fill_lines(file.fileno(), list(out.view(torch.uint8).numpy()), offset, num_columns * size)
        if not is_finite(out):
            raise UserError(f"{self.path}: '{self.name}' holds values that are infinite or not numbers (NaN)")

    def _read_ahead(self, descriptor: int, offset: int) -> None:
        """Let the disk work on what comes next: rows of several tensors are read in turns, which it cannot foresee."""
        window = (offset - self.offset) // _AHEAD_BYTES
        if window != self.window and hasattr(os, "posix_fadvise"):
            self.window = window
            start = self.offset + window * _AHEAD_BYTES
            stop = min(start + 2 * _AHEAD_BYTES, self.offset + math.prod(self.shape) * self.dtype.itemsize)
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _fill_lines(self, descriptor: int, lines: list[np.ndarray[Any, Any]], offset: int, stride: int) -> None:
        """Parts of rows that lie a stride apart, many with one call: what lies between is read and left."""
        between = bytearray(stride - len(lines[0]))
        for start in range(0, len(lines), _LINES):
            group = lines[start : start + _LINES]
            buffers: list[Any] = [buffer for line in group for buffer in (line, between)][:-1]
            expected = (len(group) - 1) * stride + len(group[0])
            if os.preadv(descriptor, buffers, offset) != expected:
                for number, line in enumerate(group):
                    self._fill(descriptor, line, offset + number * stride)
            offset += len(group) * stride

    def _fill(self, descriptor: int, buffer: np.ndarray[Any, np.dtype[np.uint8]], offset: int) -> None:
        view = buffer.data
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise UserError(f"{self.path}: '{self.name}' ends early: the file has shrunk while it was read")
            view = view[count:]
            offset = offset + count


def is_finite(values: Tensor) -> bool:
    """Whether a CPU tensor holds numbers only, at the speed of memory."""
    if not values.numel():
        return True
    bits = values.view(_INTEGERS[values.dtype.itemsize]).numpy()
    return int((bits << 1).max()) < _NOT_FINITE[NAMES[values.dtype]]


_INTEGERS = {8: torch.uint64, 4: torch.uint32, 2: torch.uint16}


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file with these tensors, in this order, as the safetensors library writes it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_order(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The order in which the safetensors library puts tensors into a file: wide types first, so all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
