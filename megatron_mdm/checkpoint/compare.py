"""Two checkpoints, tensor by tensor, whatever their forms and layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_mdm.checkpoint.huggingface import CONFIG, HuggingFaceCheckpoint, is_checkpoint, read_json
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, blocks, num_bytes
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.checkpoint.peft import ADAPTER_FILE, family_of_names, is_adapter, stored_tensors
from megatron_mdm.checkpoint.peft_config import read_settings
from megatron_mdm.checkpoint.peft_export import tensors_to_write
from megatron_mdm.checkpoint.weights import Source, opened, whole_tensors
from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.progress import progress_bar


def differences(one: Path, other: Path, ignore_fields: Sequence[str] = ()) -> Iterator[str]:
    """A text for each tensor of either checkpoint: '' where both hold the same bits, else what differs.

    Two Hugging Face checkpoints of one family are compared under their own names, others under ours; adapters, where
    one is a folder of PEFT's, under PEFT's. ignore_fields: of a config.json, to be read as if they were absent.
    """
    if is_adapter(one) or is_adapter(other):
        left, right = _adapters(one, other), _adapters(other, one)
        scalings = _scaling(one), _scaling(other)
        if scalings[0] != scalings[1]:
            yield f"scaling: {scalings[0]:g} and {scalings[1]:g}"
    else:
        left, right = _whole(_opened(one, ignore_fields), _opened(other, ignore_fields))
    total = sum(num_bytes(tensor, tensor.dtype) for tensor in left.values())
    with progress_bar(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="compare") as bar:
        for name in [*left, *(name for name in right if name not in left)]:
            if name not in left or name not in right:
                yield f"{name}: only in {one if name in left else other}"
                continue
            yield _difference(name, left[name], right[name])
            bar.update(num_bytes(left[name], left[name].dtype))


def _difference(name: str, left: LazyTensor, right: LazyTensor) -> str:
    if tuple(left.shape) != tuple(right.shape):
        return f"{name}: shape {list(left.shape)} and {list(right.shape)}"
    if left.dtype != right.dtype:
        return (
            f"{name}: type {_text(left.dtype)} and {_text(right.dtype)}; greatest difference {_greatest(left, right)}"
        )
    for a, b in zip(blocks(left, left.dtype), blocks(right, right.dtype)):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return f"{name}: values; greatest difference {_greatest(left, right)}"
    return ""


def _greatest(left: LazyTensor, right: LazyTensor) -> str:
    pairs = zip(blocks(left, torch.float32), blocks(right, torch.float32))
    return f"{max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0):.3g}"


def _opened(folder: Path, ignore_fields: Sequence[str]) -> Source:
    present = read_json(folder / CONFIG).keys() if is_checkpoint(folder) else ()
    return opened(folder, [name for name in ignore_fields if name in present])


def _whole(ours: Source, theirs: Source) -> tuple[Mapping[str, LazyTensor], Mapping[str, LazyTensor]]:
    pair = (ours, theirs)
    files = [source for source in pair if isinstance(source, HuggingFaceCheckpoint)]
    if len({source.family.keys for source in files}) == 1 and len(files) == len(pair):
        return files[0].tensors, files[1].tensors
    return whole_tensors(ours), whole_tensors(theirs)


def _adapters(folder: Path, other: Path) -> Mapping[str, LazyTensor]:
    """By PEFT's names; a run's, by those of the family whose names the other folder has."""
    if is_adapter(folder):
        return stored_tensors(folder)
    run = _run_with_adapters(folder)
    family = family_of_names(other / ADAPTER_FILE, stored_tensors(other), run.config.model)
    return tensors_to_write(run, family)


def _scaling(folder: Path) -> float:
    if is_adapter(folder):
        return read_settings(folder, num_layers=0).lora.scaling
    return _run_with_adapters(folder).config.model.lora.scaling


def _run_with_adapters(folder: Path) -> NativeCheckpoint:
    run = NativeCheckpoint.open(folder)
    if not run.config.model.lora.rank:
        raise UserError(f"{folder}: the run has no adapters to compare with a folder of PEFT's")
    return run


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
