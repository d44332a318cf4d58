"""Floating-point operations of the model's parts, from its configuration alone."""

from __future__ import annotations

from megatron_mdm.config.schema import ModelConfig


def layer_costs(model: ModelConfig, length: float) -> list[float]:
    """Forward FLOPs per position of embedding, blocks and head: what partitioning balances. Half of the positions reach
    the head."""
    width = model.kv_channels * model.num_heads
    attention = model.hidden_size * 2 * (width + model.kv_channels * model.num_kv_heads)
    matrices = attention + 3 * model.hidden_size * model.ffn_hidden_size
    block = 2.0 * matrices + 4.0 * length * width
    head = 0.5 * 2.0 * model.hidden_size * int(model.vocab_size)
    return [0.0, *[block] * model.num_layers, head]


def training_flops(model: ModelConfig, num_tokens: int, length: float, num_selected: int) -> float:
    """FLOPs of a step's forward and backward passes, without what is computed again: what MFU counts.

    num_tokens: of all rows, without padding; length: of a row, on average (attention grows with it; lengths that vary
    make it a little too small); num_selected: positions whose logits are computed.
    """
    assert isinstance(model.vocab_size, int)
    blocks = sum(layer_costs(model, length)[1:-1])
    return 3.0 * (num_tokens * blocks + 2.0 * model.hidden_size * int(model.vocab_size) * num_selected)
