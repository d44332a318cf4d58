"""Tensors that are put together from parts of others, and read only where and when they are needed.

Everything is a matrix here: a vector has one column. Query, key and value in one matrix, tensor-parallel shards, a
grown table: each is rows or columns of other views, so a conversion is an expression and a read touches its bytes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_mdm.models.sharding import Sharding, sharding_of

Shape = tuple[int, ...]
_BLOCK_BYTES = 16 * 1024 * 1024


class LazyTensor(Protocol):
    shape: Shape
    dtype: torch.dtype

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        """Fill out [r, c], on the CPU, its columns adjacent in memory, from this row and column on."""
        ...


class Part(NamedTuple):
    """Rows (of Rows) or columns (of Columns) [start, start + length) of a view."""

    view: LazyTensor
    start: int
    length: int


class Rows:
    """Rows of other views, one below the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.dtype = parts[0].view.dtype
        self.shape: Shape = (sum(part.length for part in parts), *parts[0].view.shape[1:])

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        for part, at, start, stop in _overlaps(self.parts, row, len(out)):
            part.view.read_into(out[at : at + stop - start], part.start + start, column)


class Columns:
    """Columns of other views, side by side."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.dtype = parts[0].view.dtype
        self.shape: Shape = (parts[0].view.shape[0], sum(part.length for part in parts))

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        for part, at, start, stop in _overlaps(self.parts, column, out.shape[1]):
            part.view.read_into(out[:, at : at + stop - start], row, part.start + start)


class Flat:
    """A tensor cut into runs of its elements, regardless of rows: vectors, one behind the other."""

    def __init__(self, parts: Sequence[LazyTensor], shape: Shape) -> None:
        self.parts = [Part(part, 0, math.prod(part.shape)) for part in parts]
        self.dtype, self.shape = parts[0].dtype, shape

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        _, columns = matrix_shape(self.shape)
        step = max(1, _BLOCK_BYTES // max(1, columns * out.dtype.itemsize))
        for start in range(0, len(out), step):
            block = out[start : start + step]
            is_whole = block.shape[1] == columns and block.is_contiguous()
            rows = block if is_whole else torch.empty(len(block), columns, dtype=out.dtype)
            elements = rows.view(-1, 1)
            for part, at, first, last in _overlaps(self.parts, (row + start) * columns, len(elements)):
                part.view.read_into(elements[at : at + last - first], first, 0)
            if not is_whole:
                block.copy_(rows[:, column : column + block.shape[1]])


class RepeatedRow:
    """As many rows as wanted, all alike."""

    def __init__(self, row: Tensor, num_rows: int) -> None:
        """row [columns]"""
        self.row, self.dtype, self.shape = row, row.dtype, (num_rows, len(row))

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        out.copy_(self.row[column : column + out.shape[1]].expand(out.shape))


def cut(view: LazyTensor, sharding: Sharding, rank: int, degree: int) -> LazyTensor:
    """The shard that a tensor-parallel rank holds. The split dimension is a multiple of the degree."""
    if sharding.dim < 0 or degree == 1:
        return view
    intervals = sharding.intervals(view.shape[sharding.dim], rank, degree)
    return (Rows, Columns)[sharding.dim]([Part(view, start, stop - start) for start, stop in intervals])


def merge(shards: Sequence[LazyTensor], sharding: Sharding) -> LazyTensor:
    """The whole of all ranks' shards, in rank order."""
    if sharding.dim < 0 or len(shards) == 1:
        return shards[0]
    length = shards[0].shape[sharding.dim] // sharding.interleave
    parts = [Part(shard, i * length, length) for i in range(sharding.interleave) for shard in shards]
    return (Rows, Columns)[sharding.dim](parts)


def with_rows(view: LazyTensor, num_rows: int, fill: Tensor | None = None) -> LazyTensor:
    """The view cut, or filled up with zeros (or a row, [columns]), to a number of rows."""
    rows, columns = view.shape
    if num_rows == rows:
        return view
    if num_rows < rows:
        return Rows([Part(view, 0, num_rows)])
    row = torch.zeros(columns, dtype=view.dtype) if fill is None else fill
    extra = RepeatedRow(row, num_rows - rows)
    return Rows([Part(view, 0, rows), Part(extra, 0, num_rows - rows)])


def with_grown_tables(views: dict[str, LazyTensor], vocab_size: int) -> dict[str, LazyTensor]:
    """A model's parameters, its vocabulary's tables with that many rows; a new row is the mean of the others."""
    result = dict(views)
    for name, view in views.items():
        if sharding_of(name).is_vocabulary and view.shape[0] < vocab_size:
            result[name] = with_rows(view, vocab_size, mean_row(view))
    return result


def read(view: LazyTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor, in its own dtype or another."""
    out = torch.empty(view.shape, dtype=dtype or view.dtype)
    view.read_into(as_matrix(out), 0, 0)
    return out


def blocks(view: LazyTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's rows, some at a time, in memory that the next block does not touch. [r, columns]"""
    rows, columns = matrix_shape(view.shape)
    step = max(1, _BLOCK_BYTES // max(1, columns * dtype.itemsize))
    for start in range(0, rows, step):
        out = torch.empty(min(step, rows - start), columns, dtype=dtype)
        view.read_into(out, start, 0)
        yield out


def mean_row(view: LazyTensor) -> Tensor:
    """The mean of a matrix's rows, summed in float64. [columns], in the view's dtype"""
    total = torch.zeros(view.shape[1], dtype=torch.float64)
    for block in blocks(view, torch.float32):
        total += block.sum(0, dtype=torch.float64)
    return (total / view.shape[0]).to(view.dtype)


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.view(matrix_shape(tensor.shape))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def num_bytes(view: LazyTensor, dtype: torch.dtype) -> int:
    return math.prod(view.shape) * dtype.itemsize


def _overlaps(parts: Sequence[Part], first: int, count: int) -> Iterator[tuple[Part, int, int, int]]:
    """Where [first, first + count) meets each part: (part, place in the result, start and stop within the part)."""
    position = 0
    for part in parts:
        start, stop = max(first - position, 0), min(first + count - position, part.length)
        if start < stop:
            yield part, position + start - first, start, stop
        position += part.length
