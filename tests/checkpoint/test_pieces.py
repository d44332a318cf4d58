"""Memory in pieces: at most one is wasted, and what is written does not depend on their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mdm.checkpoint.direct_writer import PAGE, write_memory
from megatron_mdm.checkpoint.pieces import PIECE_BYTES, Pieces


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 9 * PAGE + 5])
def test_less_than_a_piece_is_wasted(length: int) -> None:
    pieces = Pieces(2 * PAGE)
    pieces.hold(length)
    assert 0 <= sum(map(len, pieces.pieces)) - length < 2 * PAGE
    assert sum(map(len, pieces.parts())) == length
    assert all(piece.data_ptr() % PAGE == 0 for piece in pieces.pieces)


def test_pieces_are_powers_of_two() -> None:
    """As torch's pinned allocator rounds up to."""
    assert PIECE_BYTES & (PIECE_BYTES - 1) == 0


def test_memory_is_kept() -> None:
    pieces = Pieces(PAGE)
    pieces.hold(5 * PAGE)
    before = [piece.data_ptr() for piece in pieces.pieces]
    pieces.hold(PAGE + 1)
    pieces.hold(5 * PAGE)
    assert [piece.data_ptr() for piece in pieces.pieces] == before


@pytest.mark.parametrize("piece_bytes", [PAGE, 4 * PAGE, PIECE_BYTES])
def test_tensors_go_over_the_bounds_of_pieces(piece_bytes: int, tmp_path: Path) -> None:
    values = [torch.arange(3, dtype=torch.uint8), torch.randn(5 * PAGE), torch.randn(2).bfloat16(), torch.randn(3000)]
    places = [0, 8, 8 + 20 * PAGE, 16 + 20 * PAGE]
    length = places[-1] + values[-1].nbytes
    pieces = Pieces(piece_bytes)
    pieces.hold(length)
    expected = bytearray(length)
    for place, tensor in zip(places, values, strict=True):
        pieces.write(place, tensor)
        expected[place : place + tensor.nbytes] = tensor.view(torch.uint8).numpy().tobytes()
    write_memory(tmp_path / "file", list(pieces.parts()))
    assert (tmp_path / "file").read_bytes() == bytes(expected)


def test_memory_that_begins_elsewhere_is_written_through_the_cache(tmp_path: Path) -> None:
    data: Any = bytearray(range(256)) * 64
    whole = memoryview(data)
    write_memory(tmp_path / "file", [whole[1 : PAGE + 1], whole[:PAGE]])
    assert (tmp_path / "file").read_bytes() == bytes(data[1 : PAGE + 1] + data[:PAGE])
