"""Names, shapes and costs of the model's parts, from its configuration alone: no module is built."""

from __future__ import annotations

import math

from megatron_mdm.config.schema import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "0.word_embeddings.weight"


def final_norm_name(model: ModelConfig) -> str:
    return f"{model.num_layers + 1}.final_norm.weight"


def head_name(model: ModelConfig) -> str:
    return f"{model.num_layers + 1}.vocabulary_weight"


def layer_prefix(layer: int) -> str:
    """Of a layer's parameters; layer counts from 0, in names from the embedding."""
    return f"{layer + 1}.layer."


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Canonical name → shape without tensor parallelism and without padding of the vocabulary, in the layers' order."""
    assert isinstance(model.vocab_size, int)
    hidden, table = model.hidden_size, (model.vocab_size, model.hidden_size)
    shapes: dict[str, Shape] = {EMBEDDING: table}
    for layer in range(model.num_layers):
        prefix = layer_prefix(layer)
        shapes.update({prefix + name: shape for name, shape in _layer_shapes(model).items()})
    shapes[final_norm_name(model)] = (hidden,)
    if not model.tie_embeddings:
        shapes[head_name(model)] = table
    return shapes


def num_parameters(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def checkpoint_bytes(model: ModelConfig) -> int:
    """Of a run's checkpoint: fp32 weights and two moments."""
    return 12 * num_parameters(model)


def padded_vocab_size(model: ModelConfig, degree: int) -> int:
    """Rows of the vocabulary tables: a multiple of vocab_divisor × tensor-parallel degree."""
    multiple = model.vocab_divisor * degree
    return (model.vocab_size + multiple - 1) // multiple * multiple


def layer_costs(model: ModelConfig, length: float) -> list[float]:
    """Forward FLOPs per position of embedding, blocks and head: what partitioning balances. Half of the positions reach
    the head."""
    width = model.kv_channels * model.num_heads
    attention = model.hidden_size * 2 * (width + model.kv_channels * model.num_kv_heads)
    matrices = attention + 3 * model.hidden_size * model.ffn_hidden_size
    block = 2.0 * matrices + 4.0 * length * width
    head = 0.5 * 2.0 * model.hidden_size * model.vocab_size
    return [0.0, *[block] * model.num_layers, head]


def training_flops(model: ModelConfig, num_tokens: int, length: float, num_selected: int) -> float:
    """Of a step's forward and backward passes, without what is computed again: what MFU counts.

    num_tokens: of all rows, without padding; length: of a row, on average (attention grows with it; lengths that vary
    make it a little too small); num_selected: positions whose logits are computed.
    """
    assert isinstance(model.vocab_size, int)
    blocks = sum(layer_costs(model, length)[1:-1])
    return 3.0 * (num_tokens * blocks + 2.0 * model.hidden_size * model.vocab_size * num_selected)


def _layer_shapes(model: ModelConfig) -> dict[str, Shape]:
    hidden, head_dim = model.hidden_size, model.kv_channels
    qkv = (model.num_heads + 2 * model.num_kv_heads) * head_dim
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "self_attention.linear_qkv.weight": (qkv, hidden)}
    if model.qkv_bias:
        shapes["self_attention.linear_qkv.bias"] = (qkv,)
    if model.qk_norm:
        shapes["self_attention.q_layernorm.weight"] = (head_dim,)
        shapes["self_attention.k_layernorm.weight"] = (head_dim,)
    shapes["self_attention.linear_proj.weight"] = (hidden, model.num_heads * head_dim)
    shapes["pre_mlp_layernorm.weight"] = (hidden,)
    shapes["mlp.linear_fc1.weight"] = (2 * model.ffn_hidden_size, hidden)
    shapes["mlp.linear_fc2.weight"] = (hidden, model.ffn_hidden_size)
    return shapes
