"""Import and export at full size against a plain copy: seconds, peak memory, bytes. Needs about 4 checkpoints' space.

python -m tools.benchmarks checkpoints --folder /large/disk --layers 32
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.checkpoint.convert import shard_name
from megatron_mdm.checkpoint.lazy_tensors import matrix_shape
from megatron_mdm.checkpoint.stream import JOURNAL, Output, OutputFile, split, write_files
from megatron_mdm.config.files import sha256, write_json
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.families import FAMILIES
from megatron_mdm.models.families.keymap import family_shapes

LLADA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_heads": 32,
    "num_kv_heads": 32,
    "ffn_hidden_size": 12288,
    "max_sequence_length": 4096,
    "vocab_size": 126464,
    "rope_theta": 500000.0,
}
SHARD_BYTES = 5 * 10**9
TOOL = str(Path(__file__).parents[1] / "convert_checkpoint.py")


class RandomTensor:
    """Finite bf16 numbers: one pool of random bits, from a place that depends on tensor and row."""

    dtype = torch.bfloat16
    pool = torch.from_numpy(np.random.default_rng(0).integers(0, 2**16, 2**25, np.uint16) & 0xBFFF).view(torch.bfloat16)

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape = shape
        self.seed = seed

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        start = (self.seed * 7_919 + row * 104_729) % (len(self.pool) - out.numel())
        out.copy_(self.pool[start : start + out.numel()].view(out.shape))


def make_checkpoint(folder: Path, num_layers: int) -> int:
    """A synthetic LLaDA checkpoint in shards. Returns its bytes."""
    family = FAMILIES["llada"]
    model = ModelConfig(num_layers=num_layers, **LLADA_8B)
    shapes = family_shapes(family, model)
    outputs = [(name, Output(RandomTensor(shape, i), torch.bfloat16)) for i, (name, shape) in enumerate(shapes.items())]
    assert all(len(matrix_shape(shape)) == 2 for shape in shapes.values())
    groups = split(outputs, SHARD_BYTES)
    files = [OutputFile(shard_name(number, len(groups)), group) for number, group in enumerate(groups, 1)]
    write_files(files, folder, {})
    (folder / JOURNAL).unlink()
    places = {name: file.path for file in files for name in file.tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    config = family.write(model, {})
    write_json(folder / "config.json", {**config, "mask_token_id": 126336, "eos_token_id": 126081})
    return sum(file.num_bytes for file in files)


def forget(folder: Path) -> None:
    """Write a folder's files back and drop them from the page cache, so that every step reads from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def plain_copy(source: Path, target: Path) -> float:
    """Seconds of copying a folder's files, until they are on the disk."""
    forget(source)
    start = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def run_tool(source: Path, *arguments: str) -> tuple[float, float]:
    """(seconds, peak resident GiB) of a process of tools/convert_checkpoint.py."""
    forget(source)
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, TOOL, *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def measure(folder: Path, num_layers: int) -> dict[str, object]:
    source = folder / "source"
    run = folder / "run"
    out = folder / "exported"
    source.mkdir()
    size = make_checkpoint(source, num_layers)
    result: dict[str, Any] = {"layers": num_layers, "gigabytes": size / 1e9, "copy_seconds": []}
    copies = [plain_copy(source, folder / "copy")]
    layout = ("--tensor", "2", "--pipeline", "2")
    importing = ("import", str(source), "--output", str(run), *layout)
    result["import_seconds"], result["import_gib"] = run_tool(source, *importing)
    copies.append(plain_copy(source, folder / "copy"))
    result["export_seconds"], result["export_gib"] = run_tool(run, "export", str(run), "--output", str(out))
    shutil.rmtree(run)
    copies.append(plain_copy(source, folder / "copy"))
    weights = sorted(path.name for path in source.glob("*.safetensors"))
    assert weights == sorted(path.name for path in out.glob("*.safetensors"))
    result["identical_bytes"] = all(sha256(source / name) == sha256(out / name) for name in weights)
    configs = [json.loads((place / "config.json").read_text(encoding="utf-8")) for place in (source, out)]
    result["identical_config"] = configs[0] == configs[1]
    result["copy_seconds"] = copies
    for kind, before in (("import", 0), ("export", 1)):  # the copies next to it in time
        result[f"{kind}_relative_throughput"] = sum(copies[before : before + 2]) / 2 / result[f"{kind}_seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure; everything is removed")
    parser.add_argument("--layers", type=int, default=32, help="of LLaDA-8B's 32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments.layers), indent=1))
