"""Tensors that are put together from parts of others, and read only where and when they are needed.

Everything is a matrix here: a vector has one column. Query, key and value in one matrix, tensor-parallel shards, a
grown table: each is rows or columns of other tensors, so a conversion is an expression and a read touches its bytes
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.parameters import Parameter, parameter_table
from megatron_mdm.models.sharding import Shape, Split

_BLOCK_BYTES = 16 * 1024 * 1024


class LazyTensor(Protocol):
    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        """Fill out [r, c], on the CPU, its columns adjacent in memory, from this row and column on."""
        ...


class Part(NamedTuple):
    """Rows (of Rows) or columns (of Columns) [start, start + length) of a tensor."""

    tensor: LazyTensor
    start: int
    length: int


class Rows:
    """Rows of other tensors, one below the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.dtype = parts[0].tensor.dtype
        self.shape: Shape = (sum(part.length for part in parts), *parts[0].tensor.shape[1:])

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        for part, at, start, stop in _overlaps(self.parts, row, len(out)):
            part.tensor.read_into(out[at : at + stop - start], part.start + start, column)


class Columns:
    """Columns of other tensors, side by side."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.dtype = parts[0].tensor.dtype
        self.shape: Shape = (parts[0].tensor.shape[0], sum(part.length for part in parts))

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        for part, at, start, stop in _overlaps(self.parts, column, out.shape[1]):
            part.tensor.read_into(out[:, at : at + stop - start], row, part.start + start)


class Flat:
    """A tensor cut into runs of its elements, regardless of rows: vectors, one behind the other."""

    def __init__(self, parts: Sequence[LazyTensor], shape: Shape) -> None:
        self.parts = [Part(part, 0, math.prod(part.shape)) for part in parts]
        self.dtype = parts[0].dtype
        self.shape = shape

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        _, columns = matrix_shape(self.shape)
        step = max(1, _BLOCK_BYTES // max(1, columns * out.dtype.itemsize))
        for start in range(0, len(out), step):
            block = out[start : start + step]
            is_run = len(block) == 1 or (block.shape[1] == columns and block.is_contiguous())
            rows = block if is_run else torch.empty(len(block), columns, dtype=out.dtype)
            elements = rows.view(-1, 1)
            position = (row + start) * columns + (column if is_run else 0)
            for part, at, first, last in _overlaps(self.parts, position, len(elements)):
                part.tensor.read_into(elements[at : at + last - first], first, 0)
            if not is_run:
                block.copy_(rows[:, column : column + block.shape[1]])


class Transposed:
    """A matrix's columns as rows."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype
        self.shape: Shape = (tensor.shape[1], tensor.shape[0])

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        lines = torch.empty(out.shape[1], out.shape[0], dtype=out.dtype)
        self.tensor.read_into(lines, column, row)
        out.copy_(lines.t())


class RepeatedRow:
    """One row, repeated as often as wanted."""

    def __init__(self, row: Tensor, num_rows: int) -> None:
        """row [columns]"""
        self.row = row
        self.dtype = row.dtype
        self.shape = (num_rows, len(row))

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        out.copy_(self.row[column : column + out.shape[1]].expand(out.shape))


def cut(tensor: LazyTensor, split: Split | None, rank: int, degree: int) -> LazyTensor:
    """The shard that a tensor-parallel rank holds. tensor: the whole, with padding; split: None where it is not."""
    if split is None or degree == 1:
        return tensor
    intervals = split.intervals(tensor.shape[split.dim], rank, degree)
    return (Rows, Columns)[split.dim]([Part(tensor, start, stop - start) for start, stop in intervals])


def merge(shards: Sequence[LazyTensor], split: Split | None) -> LazyTensor:
    """The whole of all tensor-parallel ranks' shards, in rank order."""
    if split is None or len(shards) == 1:
        return shards[0]
    length = shards[0].shape[split.dim] // split.interleave
    parts = [Part(shard, i * length, length) for i in range(split.interleave) for shard in shards]
    return (Rows, Columns)[split.dim](parts)


def with_rows(tensor: LazyTensor, num_rows: int, fill: Tensor | None = None) -> LazyTensor:
    """The tensor, cut or zero-padded (or padded with a row, [columns]) to a number of rows."""
    rows, columns = tensor.shape
    if num_rows == rows:
        return tensor
    if num_rows < rows:
        return Rows([Part(tensor, 0, num_rows)])
    row = torch.zeros(columns, dtype=tensor.dtype) if fill is None else fill
    extra = RepeatedRow(row, num_rows - rows)
    return Rows([Part(tensor, 0, rows), Part(extra, 0, num_rows - rows)])


def with_padding(tensor: LazyTensor, row: Parameter, degree: int) -> LazyTensor:
    """A whole parameter with the rows of padding that the tensor-parallel degree asks for."""
    return with_rows(tensor, row.padded_shape(degree)[0]) if row.is_vocabulary else tensor


def with_grown_tables(tensors: dict[str, LazyTensor], model: ModelConfig) -> dict[str, LazyTensor]:
    """A model's parameters by name, the vocabulary's tables with the rows that the model section asks for; a new row is
    the mean of the others."""
    grown = dict(tensors)
    table = parameter_table(model)
    for name, tensor in tensors.items():
        if table[name].is_vocabulary and tensor.shape[0] < table[name].shape[0]:
            grown[name] = with_rows(tensor, table[name].shape[0], mean_row(tensor))
    return grown


def read(tensor: LazyTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor, in its own dtype or another."""
    out = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
    tensor.read_into(as_matrix(out), 0, 0)
    return out


def read_elements(tensor: LazyTensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """[count]: the elements from this one on, row after row. Reads no others of a row that is cut."""
    _, columns = matrix_shape(tensor.shape)
    out = torch.empty(count, dtype=dtype)
    done = 0
    while done < count:
        row, column = divmod(start + done, columns)
        left = count - done
        rows = left // columns if column == 0 else 0  # whole ones; else to the end of this row
        length = rows * columns or min(columns - column, left)
        part = out[done : done + length].view(max(1, rows), -1)
        tensor.read_into(part, row, column)
        done += length
    return out


def blocks(tensor: LazyTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's rows, some at a time, in memory that the next block does not touch. [r, columns]"""
    rows, columns = matrix_shape(tensor.shape)
    step = max(1, _BLOCK_BYTES // max(1, columns * dtype.itemsize))
    for start in range(0, rows, step):
        out = torch.empty(min(step, rows - start), columns, dtype=dtype)
        tensor.read_into(out, start, 0)
        yield out


def mean_row(tensor: LazyTensor) -> Tensor:
    """The mean of a matrix's rows, summed in float64. [columns], in the tensor's dtype"""
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for block in blocks(tensor, torch.float32):
        total += block.sum(0, dtype=torch.float64)
    return (total / tensor.shape[0]).to(tensor.dtype)


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.view(matrix_shape(tensor.shape))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def num_bytes(tensor: LazyTensor, dtype: torch.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _overlaps(parts: Sequence[Part], first: int, count: int) -> Iterator[tuple[Part, int, int, int]]:
    """The overlaps of [first, first + count) with the parts: (part, place in the result, start and stop within it)."""
    position = 0
    for part in parts:
        start = max(first - position, 0)
        stop = min(first + count - position, part.length)
        if start < stop:
            yield part, position + start - first, start, stop
        position += part.length
