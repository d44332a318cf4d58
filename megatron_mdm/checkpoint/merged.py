"""Weights into which low-rank adapters are merged, W + scaling · B·A, read block by block as any other tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, Part, Rows, Transposed
from megatron_mdm.config.schema import LoraConfig, ModelConfig
from megatron_mdm.models.adapter_rows import adapters_of
from megatron_mdm.models.families.keymap import matrices, our_parameters
from megatron_mdm.models.families.llama import LLAMA

_SCRATCH_ELEMENTS = 2 * 1024 * 1024  # of a block in float64


class Merged:
    """base + scaling · left·right, computed in float64 and rounded once, to the type that is asked for: the same bits
    whichever block is read."""

    def __init__(self, base: LazyTensor, left: LazyTensor, right: LazyTensor, scaling: float) -> None:
        """base [out, in], left [out, r], right [r, in]"""
        self.base = base
        self.left = left
        self.right = right
        self.scaling = scaling
        self.dtype = base.dtype
        self.shape = base.shape

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        rank = self.left.shape[1]
        right = torch.empty(rank, out.shape[1], dtype=torch.float64)
        self.right.read_into(right, 0, column)
        step = max(1, _SCRATCH_ELEMENTS // max(1, out.shape[1]))
        for start in range(0, len(out), step):
            part = out[start : start + step]
            left = torch.empty(len(part), rank, dtype=torch.float64)
            self.left.read_into(left, row + start, 0)
            block = torch.empty(part.shape, dtype=torch.float64)
            self.base.read_into(block, row + start, column)
            part.copy_(block.addmm_(left, right, alpha=self.scaling))


@dataclass(frozen=True)
class AdapterWeights:
    """A model's adapters, of which nothing has been read yet."""

    lora: LoraConfig
    tensors: Mapping[str, LazyTensor]  # by the rows of the table that model.lora adds; whole


class _Factors(NamedTuple):
    left: LazyTensor  # [out, r]
    right: LazyTensor  # [r, in]


def without_adapters(model: ModelConfig) -> ModelConfig:
    """The section of the model that a LoRA run's merged weights are of."""
    return model.model_copy(update={"lora": LoraConfig()})


def merged(tensors: Mapping[str, LazyTensor], adapters: AdapterWeights, model: ModelConfig) -> dict[str, LazyTensor]:
    """A model's whole parameters by name, with the adapters merged into those that have some."""
    factors = dict(_factors(adapters, model))
    targets = matrices(LLAMA, model)  # of families, any one: all have the same matrices
    result = dict(tensors)
    for name, ranges in our_parameters(LLAMA, model).items():
        if not any(targets.get(source) in factors for source, _, _ in ranges):
            continue
        parts = []
        row = 0
        for source, start, stop in ranges:
            part: LazyTensor = Rows([Part(tensors[name], row, stop - start)])
            row += stop - start
            if (found := factors.get(targets[source])) is not None:
                left = Rows([Part(found.left, start, stop - start)])
                part = Merged(part, left, found.right, adapters.lora.scaling)
            parts.append(Part(part, 0, stop - start))
        result[name] = Rows(parts)
    return result


def merged_names(adapters: AdapterWeights | None, model: ModelConfig) -> frozenset[str]:
    """Our parameters that differ from the base's where these adapters are merged into it."""
    if adapters is None:
        return frozenset()
    targets = matrices(LLAMA, model)
    adapted = {(adapter.target, adapter.layer) for adapter in adapters_of(_with(model, adapters.lora))}
    return frozenset(
        name
        for name, ranges in our_parameters(LLAMA, model).items()
        if any(targets.get(source) in adapted for source, _, _ in ranges)
    )


def _factors(adapters: AdapterWeights, model: ModelConfig) -> Iterator[tuple[tuple[str, int], _Factors]]:
    for adapter in adapters_of(_with(model, adapters.lora)):
        a = adapters.tensors[adapter.a]
        b = adapters.tensors[adapter.b]
        # The embedding's A is kept as its transpose [vocabulary, r], and its matrix is the transpose of B·A.
        factors = _Factors(a, Transposed(b)) if adapter.target == "embedding" else _Factors(b, a)
        yield (adapter.target, adapter.layer), factors


def _with(model: ModelConfig, lora: LoraConfig) -> ModelConfig:
    return model.model_copy(update={"lora": lora})
