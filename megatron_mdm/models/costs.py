"""Floating-point operations of the model's parts, from its configuration alone."""

from __future__ import annotations

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_rows import TABLES, matrix_shape, targets_of


def layer_costs(model: ModelConfig, length: float) -> list[float]:
    """Forward FLOPs per position of embedding, blocks and head: what partitioning balances. Half of the positions reach
    the head."""
    block = 2.0 * (_matrices(model) + _adapters(model)) + _attention(model, length)
    head = 0.5 * 2.0 * model.hidden_size * int(model.vocab_size)
    return [0.0, *[block] * model.num_layers, head]


def training_costs(model: ModelConfig, length: float) -> tuple[float, float]:
    """FLOPs of forward and backward passes, (of a block per position, of the head per position that reaches it): a
    frozen matrix costs two products, its own and its input's gradient, a trained one its own gradient, too."""
    frozen = model.lora.rank > 0
    products = 2.0 if frozen else 3.0
    block = 2.0 * (products * _matrices(model) + 3.0 * _adapters(model)) + 3.0 * _attention(model, length)
    head = 2.0 if frozen and "head" not in targets_of(model) else 3.0
    return block, head * 2.0 * model.hidden_size * int(model.vocab_size)


def training_flops(model: ModelConfig, num_tokens: int, length: float, num_selected: int) -> float:
    """FLOPs of a step's forward and backward passes, without what is computed again: what MFU counts.

    num_tokens: of all rows, without padding; length: of a row, on average (attention grows with it; lengths that vary
    make it a little too small); num_selected: positions whose logits are computed.
    """
    block, head = training_costs(model, length)
    return num_tokens * model.num_layers * block + num_selected * head


def _matrices(model: ModelConfig) -> float:
    """Elements of a block's matrices."""
    width = model.kv_channels * model.num_heads
    attention = model.hidden_size * 2 * (width + model.kv_channels * model.num_kv_heads)
    return attention + 3 * model.hidden_size * model.ffn_hidden_size


def _adapters(model: ModelConfig) -> float:
    """Elements of its adapters' matrices."""
    return float(model.lora.rank * sum(sum(matrix_shape(model, name)) for name in targets_of(model) - TABLES.keys()))


def _attention(model: ModelConfig, length: float) -> float:
    """Forward FLOPs of scores and contexts per position."""
    return 4.0 * length * model.kv_channels * model.num_heads
