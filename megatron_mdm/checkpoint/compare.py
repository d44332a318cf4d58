"""Two checkpoints, tensor by tensor, whatever their forms and layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_mdm.checkpoint.huggingface import CONFIG, HuggingFaceCheckpoint, is_checkpoint, read_json
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, blocks, num_bytes
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.parallel.progress import progress_bar


def differences(one: Path, other: Path, ignore_fields: Sequence[str] = ()) -> Iterator[str]:
    """A text for each tensor of either checkpoint: '' where both hold the same bits, else what differs.

    Two Hugging Face checkpoints of one family are compared under their own names, others under ours. ignore_fields: of
    a config.json, to be read as if they were absent.
    """
    ours = _opened(one, ignore_fields)
    theirs = _opened(other, ignore_fields)
    if isinstance(ours, HuggingFaceCheckpoint) and isinstance(theirs, HuggingFaceCheckpoint):
        same = ours.family.keys == theirs.family.keys
    else:
        same = False
    left: Mapping[str, LazyTensor] = ours.tensors if same else ours.lazy_tensors()  # type: ignore[union-attr]
    right: Mapping[str, LazyTensor] = theirs.tensors if same else theirs.lazy_tensors()  # type: ignore[union-attr]
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


def _opened(folder: Path, ignore_fields: Sequence[str]) -> HuggingFaceCheckpoint | NativeCheckpoint:
    if not is_checkpoint(folder):
        return NativeCheckpoint.open(folder)
    present = read_json(folder / CONFIG).keys()
    return HuggingFaceCheckpoint.open(folder, [name for name in ignore_fields if name in present])


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
