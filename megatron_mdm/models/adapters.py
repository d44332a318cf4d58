"""Low-rank adapters around megatron-core's linear maps and tables: W·x + scaling · B·(A·x) (Hu et al., LoRA, 2021).

What travels between tensor-parallel ranks for an adapter is A·x, of r numbers a token: it is gathered, summed or
scattered where the base layer's input or output is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_dropout import AdapterDropout
from megatron_mdm.models.adapter_rows import LINEAR_MAPS, SPLIT_BY_COLUMNS, matrix_shape, targets_of

ALL_ROWS = slice(None)


class Adapted(nn.Module):
    """What has adapters, and can do without."""

    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.enabled = True


class AdaptedLinear(Adapted):
    """A column- or row-parallel linear map, and an adapter for each of some of the matrices that it fuses."""

    wrapped = "base"

    def __init__(self, base: nn.Module, parts: Sequence[str], model: ModelConfig, config: TransformerConfig) -> None:
        """parts: all that base consists of, in its order."""
        super().__init__(model.lora.scaling)
        self.base = base
        self.rank = model.lora.rank
        self.sequence_parallel = config.sequence_parallel
        self.by_columns = parts[0] in SPLIT_BY_COLUMNS
        ranks = config.tensor_model_parallel_size
        # Queries that share a key and a value stand together with these: the fused matrix is made of such groups.
        self.groups = model.num_kv_heads // ranks if "key" in parts else 1
        targets = targets_of(model)
        self.heights = []  # rows of each part in a group, here
        self.adapted: list[str] = []
        for part in parts:
            outputs, inputs = matrix_shape(model, part)
            if self.by_columns:
                inputs //= ranks
            else:
                outputs //= ranks
            self.heights.append(outputs // self.groups)
            if part in targets:
                self.adapted.append(part)
                self.register_parameter(f"lora_{part}_A", _empty(self.rank, inputs))
                self.register_parameter(f"lora_{part}_B", _empty(outputs, self.rank))
        self.parts = tuple(parts)
        self.tensor_rank = get_tensor_model_parallel_rank()
        self.dropout: AdapterDropout | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden [S, R, in] → (output [S, R, out], the base's bias or None), as the base's."""
        output, bias = self.base(hidden)
        if not self.enabled:
            return output, bias
        read, scaling = self._dropped(hidden)
        low = self._between_ranks(F.linear(read, torch.cat([self._matrix(part, "A") for part in self.adapted])))
        added = torch.addmm(output.flatten(0, 1), low.flatten(0, 1), self._fused().t(), alpha=scaling)
        return added.view(output.shape), bias

    def _dropped(self, hidden: Tensor) -> tuple[Tensor, float]:
        """(what the adapters read of hidden, by how much what they add is multiplied)."""
        if self.dropout is None or self.dropout.keys is None or not self.training:
            return hidden, self.scaling
        length, _, width = hidden.shape
        position = self.tensor_rank * length if self.sequence_parallel and not self.by_columns else 0
        feature = self.tensor_rank * width if self.by_columns else 0
        return self.dropout(hidden, position, feature), self.scaling / self.dropout.kept

    def _between_ranks(self, low: Tensor) -> Tensor:
        """low [S, R, n·r] of this rank's positions or columns → of what the base's output is of."""
        if self.by_columns:
            if self.sequence_parallel:
                return cast(Tensor, reduce_scatter_to_sequence_parallel_region(low))
            return cast(Tensor, reduce_from_tensor_model_parallel_region(low))
        if self.sequence_parallel:
            return cast(Tensor, gather_from_sequence_parallel_region(low))
        return cast(Tensor, copy_to_tensor_model_parallel_region(low))

    def _fused(self) -> Tensor:
        """[out, n·r]: each part's B in its own columns, its rows where the fused matrix has the part's."""
        blocks = []
        number = len(self.adapted)
        for part, height in zip(self.parts, self.heights):
            if part in self.adapted:
                before = self.adapted.index(part) * self.rank
                after = (number - 1) * self.rank - before
                block = self._matrix(part, "B").view(self.groups, height, self.rank)
                blocks.append(F.pad(block, (before, after)))
            else:
                blocks.append(self._matrix(self.adapted[0], "B").new_zeros(self.groups, height, number * self.rank))
        return torch.cat(blocks, 1).flatten(0, 1)

    def _matrix(self, part: str, side: str) -> Tensor:
        return cast(Tensor, getattr(self, f"lora_{part}_{side}"))


class AdaptedEmbedding(Adapted):
    """A vocabulary-parallel embedding and its adapter."""

    wrapped = "base"

    def __init__(self, base: VocabParallelEmbedding, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__(model.lora.scaling)
        self.base = base
        self.lora_embedding_A = VocabParallelEmbedding(
            base.num_embeddings,
            model.lora.rank,
            init_method=config.init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        self.lora_embedding_B = _empty(model.hidden_size, model.lora.rank)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [R, S] → as the base's: [R, S, H]; under sequence parallelism [S / ranks, R, H]."""
        output = self.base(tokens)
        if not self.enabled:
            return cast(Tensor, output)
        low = self.lora_embedding_A(tokens)
        return cast(Tensor, output + self.scaling * F.linear(low, self.lora_embedding_B))


class HeadAdapter(Adapted):
    """The adapter of the vocabulary projection, which is added to the matrix itself: losses are taken chunk by chunk of
    rows, each against the whole matrix. It costs one more matrix of that size, and its gradient."""

    def __init__(self, rows: int, model: ModelConfig) -> None:
        """rows: of the vocabulary's table, here."""
        super().__init__(model.lora.scaling)
        self.lora_head_A = _empty(model.lora.rank, model.hidden_size)
        self.lora_head_B = _empty(rows, model.lora.rank)

    def forward(self, weight: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        """weight [v, H] → [v, H]; rows: which of the table's these are."""
        if not self.enabled:
            return weight
        return torch.addmm(weight, self.lora_head_B[rows], self.lora_head_A, alpha=self.scaling)


class NoHeadAdapter(nn.Module):
    """In its place where the vocabulary projection has none."""

    def forward(self, weight: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        return weight


def attach_adapters(
    layer: nn.Module, index: int, model: ModelConfig, config: TransformerConfig
) -> list[AdapterDropout]:
    """Put an AdaptedLinear around each linear map of the transformer layer with this index that has a target,
    uninitialised. Returns what is to be given the keys of every micro-batch: their dropouts."""
    targets = targets_of(model)
    dropouts = []
    for number, (path, parts) in enumerate(LINEAR_MAPS.items()):
        if targets.intersection(parts):
            parent, _, name = path.rpartition(".")
            module = layer.get_submodule(parent)
            adapted = AdaptedLinear(module.get_submodule(name), parts, model, config)
            setattr(module, name, adapted)
            if model.lora.dropout:
                adapted.dropout = AdapterDropout(model.lora.dropout, index, number)
                dropouts.append(adapted.dropout)
    return dropouts


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside, the module computes what it did before it was given adapters, bit for bit."""
    adapted: list[Any] = [part for part in module.modules() if isinstance(part, Adapted)]
    before = [part.enabled for part in adapted]
    for part in adapted:
        part.enabled = False
    try:
        yield
    finally:
        for part, enabled in zip(adapted, before):
            part.enabled = enabled


def _empty(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))
