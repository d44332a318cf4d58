"""Our safetensors files against the library's own, and views of tensors against torch."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from megatron_mdm.checkpoint.direct_writer import PAGE, DirectWriter, write_memory
from megatron_mdm.checkpoint.safetensors_file import METADATA, SafetensorsFile, is_finite
from megatron_mdm.checkpoint.stream import Output, OutputFile, write_files
from megatron_mdm.checkpoint.views import Columns, Flat, Part, Rows, cut, mean_row, merge, read, with_rows
from megatron_mdm.models.sharding import Sharding

TENSORS = {
    "wide.weight": torch.randn(5, 7),
    "a.narrow": torch.randn(3, 2).bfloat16(),
    "half": torch.randn(4).half(),
    "names with ünicode": torch.randn(1, 9),
}


@pytest.fixture
def stored(tmp_path: Path) -> SafetensorsFile:
    path = tmp_path / "library.safetensors"
    path.write_bytes(save(TENSORS, METADATA))
    return SafetensorsFile(path)


def test_written_bytes_are_those_of_the_library(stored: SafetensorsFile, tmp_path: Path) -> None:
    outputs = {name: Output(tensor, tensor.dtype) for name, tensor in stored.tensors.items()}
    entries = write_files([OutputFile("ours.safetensors", outputs)], tmp_path, {})
    written = (tmp_path / "ours.safetensors").read_bytes()
    assert written == save(TENSORS, METADATA)
    expected = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    assert entries == {"ours.safetensors": expected}


def test_types_are_converted(stored: SafetensorsFile, tmp_path: Path) -> None:
    outputs = {name: Output(tensor, torch.float16) for name, tensor in stored.tensors.items()}
    write_files([OutputFile("ours.safetensors", outputs)], tmp_path, {})
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        torch.testing.assert_close(tensor, TENSORS[name].half(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1, 4096, 16 * 2**20, 16 * 2**20 + 5, 40 * 2**20 + 4097])
def test_direct_writes(size: int, tmp_path: Path) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
    writer = DirectWriter(tmp_path / "file")
    for start in range(0, size, 9_999_999):  # pieces that fit no block
        writer.write(memoryview(data)[start : start + 9_999_999])
    writer.finish()
    writer.close()
    assert (tmp_path / "file").read_bytes() == data
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % PAGE :][:size]
    memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else memory)
    write_memory(tmp_path / "memory", memoryview(memory.numpy()))
    assert (tmp_path / "memory").read_bytes() == data


@pytest.mark.parametrize("sharding", [Sharding(0), Sharding(0, interleave=2), Sharding(1), Sharding(-1)], ids=str)
def test_cut_and_merge_as_torch_does(sharding: Sharding, tmp_path: Path) -> None:
    whole = torch.randn(8, 12)
    path = tmp_path / "whole.safetensors"
    path.write_bytes(save({"whole": whole}))
    view = SafetensorsFile(path).tensors["whole"]
    shards = [cut(view, sharding, rank, 4) for rank in range(4)]
    for rank, shard in enumerate(shards):
        torch.testing.assert_close(read(shard), sharding.shard(whole, rank, 4), rtol=0, atol=0)
    torch.testing.assert_close(read(merge(shards, sharding)), whole, rtol=0, atol=0)
    half = cut(merge(shards, sharding), sharding, 1, 2)  # another degree, through both views
    torch.testing.assert_close(read(half, torch.float64), sharding.shard(whole, 1, 2).double(), rtol=0, atol=0)


def test_parts_of_parts(stored: SafetensorsFile) -> None:
    wide, tensor = stored.tensors["wide.weight"], TENSORS["wide.weight"]
    rows = Rows([Part(wide, 3, 2), Part(wide, 0, 1)])
    expected = torch.cat([tensor[3:5], tensor[:1]])
    torch.testing.assert_close(read(Columns([Part(rows, 4, 3), Part(rows, 0, 1)])), expected[:, [4, 5, 6, 0]])
    torch.testing.assert_close(read(with_rows(wide, 7)), torch.cat([tensor, torch.zeros(2, 7)]))
    grown = read(with_rows(wide, 6, mean_row(wide)))
    torch.testing.assert_close(grown[5], tensor.mean(0))


@pytest.mark.parametrize("shape", [(8, 12), (96,), (5, 3)])
def test_runs_of_elements(shape: tuple[int, ...], tmp_path: Path) -> None:
    """As ZeRO cuts tensors: regardless of rows."""
    whole = torch.randn(shape)
    cuts = [0, 1, 7, 14, whole.numel()]
    runs = {str(index): whole.flatten()[start:stop] for index, (start, stop) in enumerate(itertools.pairwise(cuts))}
    path = tmp_path / "runs.safetensors"
    path.write_bytes(save({name: run.contiguous() for name, run in runs.items()}))
    stored = SafetensorsFile(path).tensors
    view = Flat([stored[name] for name in runs], shape)
    assert torch.equal(read(view), whole)
    assert torch.equal(read(Rows([Part(view, 2, 3)]), torch.float64), whole[2:5].double())
    if len(shape) == 2:
        assert torch.equal(read(Columns([Part(view, 1, 2)])), whole[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    good = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.smallest_normal], dtype=dtype)
    assert is_finite(good)
    for bad in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        assert not is_finite(torch.cat([good, torch.tensor([bad], dtype=dtype)]))
