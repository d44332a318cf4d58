"""Our safetensors files against the library's own, and lazy tensors against torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from megatron_mdm.checkpoint import lazy_tensors
from megatron_mdm.checkpoint.direct_writer import PAGE, DirectWriter, write_memory
from megatron_mdm.checkpoint.lazy_tensors import Columns, Flat, Part, Rows, cut, mean_row, merge, read, with_rows
from megatron_mdm.checkpoint.safetensors_file import METADATA, SafetensorsFile, is_finite
from megatron_mdm.checkpoint.stream import Output, OutputFile, split, write_files
from megatron_mdm.checkpoint.tensors import TensorReader, file_name
from megatron_mdm.config.errors import UserError
from megatron_mdm.models.sharding import Split
from tests.small import small_model

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


def test_a_value_too_great_for_its_new_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "great.safetensors"
    path.write_bytes(save({"great": torch.tensor([1.0, 7e4])}))
    outputs = {"great": Output(SafetensorsFile(path).tensors["great"], torch.float16)}
    with pytest.raises(UserError, match="'great' holds values that are too great for F16"):
        write_files([OutputFile("ours.safetensors", outputs)], tmp_path, {})


def test_what_an_earlier_call_wrote_is_kept_only_where_it_is_the_same(stored: SafetensorsFile, tmp_path: Path) -> None:
    """The same inputs, and the file as it was, by its bytes and not by its size alone."""
    outputs = {name: Output(tensor, tensor.dtype) for name, tensor in stored.tensors.items()}
    files = [OutputFile("ours.safetensors", outputs)]
    path = tmp_path / "ours.safetensors"
    write_files(files, tmp_path, {"source": 1})
    written = path.read_bytes()
    for content, source, is_kept in ((written, 1, True), (written[:-1] + b"x", 1, False), (written, 2, False)):
        path.write_bytes(content)
        os.utime(path, (0, 0))
        write_files(files, tmp_path, {"source": source})
        assert path.read_bytes() == written
        assert (path.stat().st_mtime == 0) == is_kept


def test_groups_of_at_most_so_many_bytes(stored: SafetensorsFile) -> None:
    """140, 12, 8 and 36 bytes."""
    outputs = [(name, Output(tensor, tensor.dtype)) for name, tensor in sorted(stored.tensors.items())]
    sizes = [output.num_bytes for _, output in outputs]
    assert sizes == [12, 8, 36, 140]
    for most, expected in ((20, [2, 1, 1]), (19, [1, 1, 1, 1]), (56, [3, 1]), (1000, [4]), (1, [1, 1, 1, 1])):
        assert [len(group) for group in split(outputs, most)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content + b"more", "the file is too long: "),
        (lambda content: content[:-1], "the file is truncated: "),
        (lambda content: content.replace(b"[5,7]", b"[7,7]"), "'wide.weight' has 140 bytes, which do not fit its"),
        (lambda content: content.replace(b'"F32"', b'"F64"'), "which do not fit its shape"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_named(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(change(save(TENSORS, METADATA)))
    with pytest.raises(UserError, match=message):
        SafetensorsFile(path)


def write_shard(folder: Path, rank: int, part: int, start: int, values: torch.Tensor, degree: int = 2) -> None:
    """A part of a tensor-parallel rank's shard, [2, 4], of the final norm's weight."""
    metadata = {**METADATA, "fragments": json.dumps({"decoder.final_layernorm.weight/weight": [start, 8]})}
    content = save({"decoder.final_layernorm.weight/weight": values}, metadata)
    (folder / file_name(0, rank, degree, part)).write_bytes(content)


def test_tensors_of_which_a_part_is_missing_are_named(tmp_path: Path) -> None:
    """A part at the end, in the middle, a whole shard."""
    values = torch.arange(8.0)
    for part, (start, stop) in enumerate(((0, 3), (3, 5), (5, 8))):
        write_shard(tmp_path, 0, part, start, values[start:stop], 1)
    assert torch.equal(
        read(TensorReader(tmp_path, small_model()).tensor("decoder.final_layernorm.weight", "weight")), values
    )
    (tmp_path / file_name(0, 0, 1, 2)).rename(tmp_path / "kept")
    with pytest.raises(UserError, match="is incomplete: no file has its element 5"):
        TensorReader(tmp_path, small_model())
    (tmp_path / "kept").rename(tmp_path / file_name(0, 0, 1, 2))
    (tmp_path / file_name(0, 0, 1, 1)).unlink()
    with pytest.raises(UserError, match="is incomplete: no file has its element 3"):
        TensorReader(tmp_path, small_model())
    for path in tmp_path.iterdir():
        path.unlink()
    write_shard(tmp_path, 1, 0, 0, values)
    with pytest.raises(UserError, match="has 1 of 2 tensor-parallel shards"):
        TensorReader(tmp_path, small_model()).tensor("decoder.final_layernorm.weight", "weight")


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
    write_memory(tmp_path / "memory", [memoryview(memory.numpy())])
    assert (tmp_path / "memory").read_bytes() == data


@pytest.mark.parametrize("over", [Split(0), Split(0, interleave=2), Split(1), None], ids=str)
def test_cut_and_merge_as_torch_does(over: Split | None, tmp_path: Path) -> None:
    whole = torch.randn(8, 12)
    path = tmp_path / "whole.safetensors"
    path.write_bytes(save({"whole": whole}))
    stored = SafetensorsFile(path).tensors["whole"]
    shards = [cut(stored, over, rank, 4) for rank in range(4)]
    for rank, shard in enumerate(shards):
        torch.testing.assert_close(read(shard), over.shard(whole, rank, 4) if over else whole, rtol=0, atol=0)
    torch.testing.assert_close(read(merge(shards, over)), whole, rtol=0, atol=0)
    half = cut(merge(shards, over), over, 1, 2)  # another degree, through both
    torch.testing.assert_close(
        read(half, torch.float64), (over.shard(whole, 1, 2) if over else whole).double(), rtol=0, atol=0
    )


def test_parts_of_parts(stored: SafetensorsFile) -> None:
    wide = stored.tensors["wide.weight"]
    tensor = TENSORS["wide.weight"]
    rows = Rows([Part(wide, 3, 2), Part(wide, 0, 1)])
    expected = torch.cat([tensor[3:5], tensor[:1]])
    torch.testing.assert_close(read(Columns([Part(rows, 4, 3), Part(rows, 0, 1)])), expected[:, [4, 5, 6, 0]])
    torch.testing.assert_close(read(with_rows(wide, 7)), torch.cat([tensor, torch.zeros(2, 7)]))
    grown = with_rows(wide, 6, mean_row(wide))
    torch.testing.assert_close(read(grown)[5], tensor.mean(0))
    torch.testing.assert_close(read(Columns([Part(grown, 2, 3)]))[5], tensor.mean(0)[2:5])


def test_columns_of_many_rows(tmp_path: Path) -> None:
    """More than one call to the system reads."""
    whole = torch.randn(700, 5)
    path = tmp_path / "tall.safetensors"
    path.write_bytes(save({"tall": whole}))
    assert torch.equal(read(Columns([Part(SafetensorsFile(path).tensors["tall"], 1, 3)])), whole[:, 1:4])


@pytest.mark.parametrize("block_bytes", [lazy_tensors._BLOCK_BYTES, 100])
@pytest.mark.parametrize("shape", [(8, 12), (96,), (5, 3)])
def test_runs_of_elements(
    shape: tuple[int, ...], block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ZeRO cuts tensors: regardless of rows. Also where they are read in several blocks."""
    monkeypatch.setattr(lazy_tensors, "_BLOCK_BYTES", block_bytes)
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
