"""The frozen weights of a run with adapters, or those that a policy is held to: the run holds them in no checkpoint,
but knows which they were.

They are those of `model.init_from`. A run's folder notes their fingerprint (inputs.json); whoever reads the run later,
to resume it or for the merged weights, checks that the folder still holds the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch

from megatron_mdm.checkpoint.choice import AUTO, located
from megatron_mdm.checkpoint.huggingface import is_checkpoint, open_tensors
from megatron_mdm.checkpoint.manifest import MANIFEST
from megatron_mdm.checkpoint.native import RUN_CONFIG, NativeCheckpoint
from megatron_mdm.checkpoint.safetensors_file import StoredTensor
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig

INPUTS = "inputs.json"  # in a run's folder: fingerprints of what it reads, by the key that names it
BASE = "model.init_from"
_SAMPLE = 1024  # elements at each end of a tensor that are read for a fingerprint


def pinned(config: RunConfig, resumes: bool) -> RunConfig:
    """The configuration with the very checkpoint in model.init_from where that is a run's folder and its weights are
    needed throughout: the run there may go on. A run that resumes keeps to the one that it began with."""
    path = Path(config.model.init_from)
    if not needs_base(config) or is_checkpoint(path) or not path.is_dir():
        return config
    folder, named = located(path)
    noted = noted_base(Path(config.checkpoint.directory)) if resumes else ""
    began_with = noted.partition("@")[2]
    if named == AUTO and began_with and (folder / "checkpoints" / began_with).is_dir():
        path = folder / "checkpoints" / began_with
    elif named == AUTO:
        path = NativeCheckpoint.open(path).path
    model = config.model.model_copy(update={"init_from": str(path)})
    return config.model_copy(update={"model": model})


def needs_base(config: RunConfig) -> bool:
    """Whether a run that resumes reads model.init_from again: for what adapters stand beside, or as the reference."""
    return bool(config.model.init_from) and (config.model.lora.rank > 0 or (config.rl.is_used and config.rl.beta > 0))


def fingerprint(path: Path) -> str:
    """What tells the weights in a folder from others; of a run's, with @ and the checkpoint's name. Of a Hugging Face
    checkpoint names, shapes, types and the ends of all tensors count, which training changes, so that it is not read
    whole. Raises UserError where there are no weights."""
    digest = hashlib.sha256()
    if is_checkpoint(path):
        for name, tensor in sorted(open_tensors(path).items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(_ends(tensor))
        return digest.hexdigest()
    is_named = located(path)[1] != AUTO and (path / MANIFEST).is_file()
    checkpoint = path if is_named else NativeCheckpoint.open(path).path  # which reads its files, to verify them
    digest.update(sha256(checkpoint / MANIFEST).encode())
    model = load_config(located(checkpoint)[0] / RUN_CONFIG).model
    if model.lora.rank:
        digest.update(fingerprint(Path(model.init_from)).encode())
    return f"{digest.hexdigest()}@{checkpoint.name}"


def is_of_a_run(found: str) -> bool:
    """Whether a fingerprint is of a run's checkpoint, not of Hugging Face's."""
    return "@" in found


def check_base(folder: Path, config: RunConfig) -> None:
    """Raise UserError where model.init_from of a run with adapters, which lies in a folder, is gone or has changed."""
    path = Path(config.model.init_from)
    if not path.is_dir():
        raise UserError(
            f"{folder}: its adapters need the weights of 'model.init_from' {path}: no such folder; where it has been "
            "moved, give model.init_from=FOLDER (to export: --base FOLDER)"
        )
    noted = noted_base(folder)
    if noted and noted != fingerprint(path):
        raise UserError(
            f"'model.init_from' {path}: holds other weights than the adapters in {folder} were trained beside"
        )


def noted_base(folder: Path) -> str:
    """The fingerprint of the weights that a run's adapters were trained beside; empty where it is not known."""
    path = folder / INPUTS
    return str(json.loads(path.read_text(encoding="utf-8")).get(BASE, "")) if path.is_file() else ""


def _ends(tensor: StoredTensor) -> bytes:
    """The bytes of a tensor's first and last elements."""
    size = math.prod(tensor.shape)
    flat = StoredTensor(tensor.path, tensor.name, tensor.dtype, (size,), tensor.offset)
    length = min(size, _SAMPLE)
    parts = []
    for start in (0, size - length):
        values = torch.empty(length, 1, dtype=tensor.dtype)
        flat.read_into(values, start, 0)
        parts.append(values.view(torch.uint8).numpy().tobytes())
    return b"".join(parts)
