"""What the layers keep for their backward pass, by the kernels that run them. Formulas only: no module is built.

Bytes on one tensor-parallel rank for a micro-batch. The counts follow from what each operation of models/ and of
megatron-core's local layers saves; tests/engine/test_memory.py checks those of the CPU against the saved tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_mdm.config.schema import RunConfig

Kernels = Literal["cpu", "cuda"]
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# On CPUs, attention keeps its scores in memory up to this many keys: torch 2.13's fused kernel is slower there, in bf16
# by up to 8 times in its backward pass (64 rows of 44: 28 against 6 ms; 2 of 1024: 59 against 37 ms), in fp32 by 1.6
# (32 rows of 44). Beyond it the scores take too much memory, or the fused kernel is faster.
EXPLICIT_LENGTH = {"fp32": 128, "bf16": 1024, "fp16": 1024}


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
        norms = 2 * (2 * model.hidden_size * size + 4)  # two: their inputs and outputs, the reciprocal roots in fp32
        mlp = 3 * model.ffn_hidden_size * size  # the gated unit: [gate; up] and their product
        return residual * norms + shard * (self._attention(config, shape, attention_again) + mlp)

    def rotary(self, config: RunConfig, shape: Shape) -> float:
        """Bytes of the cosines and sines that all blocks share."""
        return 2.0 * shape.length * config.model.kv_channels * _size(config)

    def workspace(self, config: RunConfig, shape: Shape) -> float:
        """The greatest temporary tensors of a block's backward pass: the gated unit's gradients."""
        width = config.model.hidden_size + 5 * config.model.ffn_hidden_size / config.parallel.tensor
        return self._positions(config, shape) * width * _size(config)

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
        longest = min(shape.length, config.data.max_length)  # that attention runs over
        if self.kernels == "cpu" and longest <= EXPLICIT_LENGTH[config.precision.dtype]:
            # Explicit scores: q, k, v of every head, the softmax, and the contexts in another order.
            return normed + (4 * query + model.num_heads * longest) * size
        return normed + (inputs + query) * size + 4 * model.num_heads  # a normaliser of each row of scores

    @staticmethod
    def _positions(config: RunConfig, shape: Shape, split: bool = False) -> float:
        """Positions on this rank; split: of which sequence parallelism gives each rank a part."""
        length = shape.length
        if config.parallel.sequence:
            length += -length % config.parallel.tensor
        return shape.rows * length / (config.parallel.tensor if split else 1)


def _size(config: RunConfig) -> int:
    return ELEMENT_BYTES[config.precision.dtype]


SAVED: dict[Kernels, SavedTensors] = {kernels: SavedTensors(kernels) for kernels in ("cpu", "cuda")}
