"""What the layers keep for their backward pass, by the kernels that run them. Formulas only: no module is built.

Bytes on one tensor-parallel rank for a micro-batch. The counts follow from what each operation of models/ and of
megatron-core's local layers saves; tests/engine/test_memory.py checks those of the CPU against the saved tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.config.validate import FOUR_BIT_BLOCK
from megatron_mdm.models.adapter_rows import LINEAR_MAPS, SPLIT_BY_COLUMNS, matrix_shape, targets_of

Kernels = Literal["cpu", "cuda"]
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FOUR_BIT_BYTES = 0.5 + 4 / FOUR_BIT_BLOCK  # of a weight and its share of the block's fp32 scale
# On CPUs, attention keeps its scores in memory up to this many keys: torch 2.13's fused kernel is slower there, in bf16
# by up to 8 times in its backward pass (64 rows of 44: 28 against 6 ms; 2 of 1024: 59 against 37 ms), in fp32 by 1.6
# (32 rows of 44). Beyond it the scores take too much memory, or the fused kernel is faster.
EXPLICIT_LENGTH = {"fp32": 128, "bf16": 1024, "fp16": 1024}


QKV, PROJECTION, FC1, FC2 = LINEAR_MAPS


class Shape(Protocol):
    """engine.communication.MicroBatchShape."""

    @property
    def rows(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class SavedTensors:
    kernels: Kernels

    def kept(self, config: RunConfig, shape: Shape, index: int) -> float:
        """Bytes that the block with this index keeps, with the recomputation that is configured."""
        parallel = config.parallel
        if parallel.recompute == "full" and index % parallel.recompute_interval == 0:
            return self._positions(config, shape, split=parallel.sequence) * config.model.hidden_size * _size(config)
        return self.block(config, shape, attention_again=parallel.recompute == "selective")

    def block(self, config: RunConfig, shape: Shape, attention_again: bool = False) -> float:
        """Bytes that one block keeps without full recomputation; attention_again: scores and contexts are computed
        again."""
        model = config.model
        size = _size(config)
        residual = self._positions(config, shape, split=config.parallel.sequence)
        shard = self._positions(config, shape) / config.parallel.tensor
        # of two norms their inputs and the reciprocal roots in fp32; their outputs, which the matrices behind them keep
        norms = 2 * (model.hidden_size * size + 4)
        norms += model.hidden_size * size * (_keeps_input(model, QKV) + _keeps_input(model, FC1))
        mlp = (2 + _keeps_input(model, FC2)) * model.ffn_hidden_size * size  # [gate; up] and their product
        attention = self._attention(config, shape, attention_again)
        return residual * norms + shard * (attention + mlp) + self._adapters(config, shape)

    def rotary(self, config: RunConfig, shape: Shape) -> float:
        """Bytes of the cosines and sines that all blocks share."""
        return 2.0 * shape.length * config.model.kv_channels * _size(config)

    def workspace(self, config: RunConfig, shape: Shape) -> float:
        """The greatest temporary tensors of a block's backward pass: the gated unit's gradients, and the greatest
        matrix where it is dequantised."""
        model = config.model
        width = model.hidden_size + 5 * model.ffn_hidden_size / config.parallel.tensor
        matrix = 0.0
        if model.lora.rank and model.lora.base == "nf4":
            shapes = ([matrix_shape(model, part) for part in parts] for parts in LINEAR_MAPS.values())
            matrix = max(sum(map(math.prod, parts)) for parts in shapes) / config.parallel.tensor
        return (self._positions(config, shape) * width + matrix) * _size(config)

    def passing(self, config: RunConfig, shape: Shape) -> float:
        """The most bytes that a block has at a time in a pass without gradients: its input, what it makes of that, and
        the gated unit's or attention's tensors."""
        model = config.model
        sequence = config.parallel.sequence
        hidden = self._positions(config, shape, split=sequence) + self._positions(config, shape)
        query = model.num_heads * model.kv_channels
        key = model.num_kv_heads * model.kv_channels
        attention = 2 * (query + 2 * key) + query  # [q, k, v], turned and scaled ones, and contexts
        if self._is_explicit(config, shape):
            attention += model.num_heads * min(shape.length, config.data.max_length)
        mlp = 4 * model.ffn_hidden_size  # [gate; up], the gate's function and a product
        shard = self._positions(config, shape) / config.parallel.tensor
        return (hidden * model.hidden_size + shard * max(attention, mlp)) * _size(config)

    def _attention(self, config: RunConfig, shape: Shape, again: bool) -> float:
        """Bytes that attention keeps per position, all heads together."""
        model = config.model
        size = _size(config)
        query = model.num_heads * model.kv_channels
        key = model.num_kv_heads * model.kv_channels
        normed = 0.0
        if model.qk_norm:
            normed = (query + key) * size + 4 * (model.num_heads + model.num_kv_heads)
        inputs = 2 * query + 3 * key  # turned queries and keys, and [q, k, v], of which v is a part
        if again:
            return normed + (inputs + query) * size
        if self._is_explicit(config, shape):
            longest = min(shape.length, config.data.max_length)  # that attention runs over
            # Explicit scores: q, k, v of every head, the softmax, and the contexts in another order.
            contexts = query * _keeps_input(model, PROJECTION)
            return normed + (3 * query + contexts + model.num_heads * longest) * size
        return normed + (inputs + query) * size + 4 * model.num_heads  # a normaliser of each row of scores

    def _adapters(self, config: RunConfig, shape: Shape) -> float:
        """Bytes that a block's adapters keep: A·x of all positions or, behind a matrix that is split by columns, of
        those that the rank goes on with; and the matrices A one below the other, the matrices B as the fused one has
        them, both made anew for every micro-batch."""
        model = config.model
        targets = targets_of(model)
        tensor = config.parallel.tensor
        kept = 0.0
        for parts in LINEAR_MAPS.values():
            width = model.lora.rank * sum(part in targets for part in parts)
            by_columns = parts[0] in SPLIT_BY_COLUMNS
            outputs = sum(matrix_shape(model, part)[0] for part in parts) / (1 if by_columns else tensor)
            inputs = matrix_shape(model, parts[0])[1] / (tensor if by_columns else 1)
            positions = self._positions(config, shape, split=config.parallel.sequence and by_columns)
            kept += width * (positions + outputs + inputs)
        return kept * _size(config) + self._dropout(config, shape)

    def _dropout(self, config: RunConfig, shape: Shape) -> float:
        """Bytes of the masks of what a block's adapters read. What they read of it takes the place of what they would
        without dropout; but fused attention keeps its contexts for itself, too."""
        model = config.model
        if not model.lora.dropout:
            return 0.0
        kept = 0.0
        keeps_contexts = config.parallel.recompute != "selective" and not self._is_explicit(config, shape)
        for module, parts in LINEAR_MAPS.items():
            if _keeps_input(model, module):
                by_columns = parts[0] in SPLIT_BY_COLUMNS
                inputs = matrix_shape(model, parts[0])[1] / (config.parallel.tensor if by_columns else 1)
                positions = self._positions(config, shape, split=config.parallel.sequence and not by_columns)
                twice = module == PROJECTION and keeps_contexts
                kept += positions * inputs * (1 + twice * _size(config))
        return kept

    def _is_explicit(self, config: RunConfig, shape: Shape) -> bool:
        """Whether attention has its scores in memory."""
        longest = min(shape.length, config.data.max_length)  # that attention runs over
        return self.kernels == "cpu" and longest <= EXPLICIT_LENGTH[config.precision.dtype]

    @staticmethod
    def _positions(config: RunConfig, shape: Shape, split: bool = False) -> float:
        """Positions on this rank; split: of which sequence parallelism gives each rank a part."""
        length = shape.length
        if config.parallel.sequence:
            length += -length % config.parallel.tensor
        return shape.rows * length / (config.parallel.tensor if split else 1)


def _size(config: RunConfig) -> int:
    return ELEMENT_BYTES[config.precision.dtype]


def _keeps_input(model: ModelConfig, module: str) -> bool:
    """Whether a linear map keeps its input for the backward pass: not beside adapters of other matrices only."""
    return not model.lora.rank or not targets_of(model).isdisjoint(LINEAR_MAPS[module])


SAVED: dict[Kernels, SavedTensors] = {kernels: SavedTensors(kernels) for kernels in ("cpu", "cuda")}
