"""What a checkpoint holds, as a tree of names with shapes, types, sizes and checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.checkpoint.huggingface import CONFIG, is_checkpoint, model_section, open_tensors, read_json
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, blocks, num_bytes
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.checkpoint.peft import is_adapter, stored_tensors
from megatron_mdm.checkpoint.peft_config import read_settings
from megatron_mdm.checkpoint.safetensors_file import NAMES
from megatron_mdm.config.schema import LoraConfig, ModelConfig
from megatron_mdm.models.families import family_of
from megatron_mdm.models.families.family import ARCHITECTURE
from megatron_mdm.parallel.progress import progress_bar

Json = dict[str, Any]
_CHECKSUM_DIGITS = 16  # of sha256, on a line for eyes


def description(folder: Path, checksums: bool, ignore_fields: Sequence[str] = ()) -> Json:
    """{"checkpoint", "architecture", "model": our section (of an adapter alone, none), ["adapter": its settings],
    "tensors": name → shape, dtype, bytes[, sha256]}"""
    about, tensors = _opened(folder, ignore_fields)
    total = sum(num_bytes(tensor, tensor.dtype) for tensor in tensors.values())
    entries: dict[str, Json] = {}
    with progress_bar(total=total, enabled=checksums, unit="B", unit_scale=True, unit_divisor=1024, desc="read") as bar:
        for name, tensor in tensors.items():
            size = num_bytes(tensor, tensor.dtype)
            dtype = NAMES[tensor.dtype]
            entry: Json = {"shape": list(tensor.shape), "dtype": dtype, "bytes": size}
            if checksums:
                entry["sha256"] = _sha256(tensor)
            entries[name] = entry
            bar.update(entry["bytes"])
    return {**about, "tensors": entries}


def _opened(folder: Path, ignore_fields: Sequence[str]) -> tuple[Json, Mapping[str, LazyTensor]]:
    """(what is told of it, its tensors)"""
    if is_checkpoint(folder):
        config = read_json(folder / CONFIG)
        family = family_of(config, str(folder / CONFIG))
        model = model_section(family, config, str(folder / CONFIG), ignore_fields)
        told: Json = {"checkpoint": str(folder), "architecture": family.architecture, "model": _section(model)}
        return told, open_tensors(folder)
    if is_adapter(folder):
        settings = read_settings(folder, num_layers=0)
        told = {"checkpoint": str(folder), "architecture": "PEFT adapter", "model": {}}
        return {**told, "adapter": _adapter(settings.lora, settings.base)}, stored_tensors(folder)
    run = NativeCheckpoint.open(folder)
    model = run.config.model
    told = {"checkpoint": str(run.path), "architecture": "megatron-mdm run", "model": _section(model)}
    if model.lora.rank:
        told["adapter"] = {**_adapter(model.lora, model.init_from), "targets": list(model.lora.targets)}
    kinds = sorted(run.reader.kinds())
    return told, {f"{name}/{kind}": tensor for kind in kinds for name, tensor in run.lazy_tensors(kind).items()}


def _adapter(lora: LoraConfig, base: str) -> Json:
    return {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "base": base}


def tree_lines(described: Json) -> list[str]:
    """The description for a terminal."""
    tensors = described["tensors"]
    total = sum(entry["bytes"] for entry in tensors.values())
    sections = {name: described[name] for name in ("model", "adapter") if described.get(name)}
    lines = [
        f"{described['checkpoint']}: {described['architecture']}, {len(tensors)} tensors, {_bytes(total)}",
        *(f"{name}: {_inline(section)}" for name, section in sections.items()),
    ]
    tree: Json = {}
    for name, entry in tensors.items():
        node = tree
        *path, leaf = re.split(r"[./]", name)
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = entry
    _add_lines(tree, "", lines)
    return lines


def _inline(section: Json) -> str:
    """A section as YAML takes it on a line."""
    return "{" + ", ".join(f"{name}: {value}" for name, value in section.items()) + "}"


def _add_lines(node: Json, indent: str, lines: list[str]) -> None:
    for number, (name, child) in enumerate(node.items()):
        last = number == len(node) - 1
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if "shape" in child and isinstance(child["shape"], list):
            shape = " × ".join(map(str, child["shape"])) or "scalar"
            checksum = child.get("sha256", "")[:_CHECKSUM_DIGITS]
            lines.append(
                f"{indent}{branch}{name}  {shape}  {child['dtype']}  {_bytes(child['bytes'])}  {checksum}".rstrip()
            )
        else:
            lines.append(f"{indent}{branch}{name}  ({_bytes(_total(child))})")
            _add_lines(child, indent + below, lines)


def _total(node: Json) -> int:
    if "shape" in node and isinstance(node["shape"], list):
        return node["bytes"]
    return sum(_total(child) for child in node.values())


def _section(model: ModelConfig) -> Json:
    """The keys of our model section by which the weights are read, as YAML takes them."""
    return {name: getattr(model, name) for name in ARCHITECTURE}


def _sha256(tensor: LazyTensor) -> str:
    digest = hashlib.sha256()
    for block in blocks(tensor, tensor.dtype):
        digest.update(block.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
