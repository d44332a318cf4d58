"""THE table of the model's parameters, from its configuration alone: no module is built.

Names, shapes, splits, initial values, decay, what is trained: initialisation, sharding, gradient norms, plans of memory
and communication, checkpoints and key maps of other formats read their part of a row, and nothing is told by a name.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_rows import with_adapters
from megatron_mdm.models.extensions import Extension, extensions_of
from megatron_mdm.models.rows import (
    EMBEDDING,
    FINAL_NORM,
    ONES,
    OUTPUT,
    ZEROS,
    Initial,
    Parameter,
    layer_prefix,
    padded_rows,
)
from megatron_mdm.models.sharding import Shape, Split

Table = Mapping[str, Parameter]


class Held(NamedTuple):
    """Elements that a rank holds."""

    trained: int
    frozen: int
    four_bit: int  # of the frozen
    # Of the trained: those whose gradients are summed over the tensor-parallel ranks, by gradient_in_parts
    in_parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.trained + self.frozen


def parameter_table(model: ModelConfig) -> Table:
    """Name → row, in the layers' order. Kept: asking again costs microseconds. Raises UserError naming an extension
    that no code has registered."""
    return _table(model.model_dump_json(), extensions_of(model))


def num_parameters(model: ModelConfig) -> int:
    return sum(row.size for row in parameter_table(model).values())


def checkpoint_bytes(model: ModelConfig) -> int:
    """Bytes of a run's checkpoint at most: fp32 weights, and two moments of what is trained."""
    rows = parameter_table(model).values()
    return sum((12 if row.trained else 4) * row.size for row in rows if not row.is_base)


def held(model: ModelConfig, layers: range, degree: int) -> Held:
    """What a pipeline stage of these layers holds on one tensor-parallel rank of this degree. Layers count from 0, the
    embedding."""
    return _held(model.model_dump_json(), extensions_of(model), layers, degree)


def padded_vocab_size(model: ModelConfig, degree: int) -> int:
    """Rows of the vocabulary tables: a multiple of vocab_divisor × tensor-parallel degree."""
    assert isinstance(model.vocab_size, int)
    return padded_rows(model.vocab_size, model.vocab_divisor, degree)


@functools.lru_cache(maxsize=64)
def _table(section: str, extensions: tuple[Extension, ...]) -> Table:
    """The table of a model section, given as JSON, with the extensions that it names."""
    model = ModelConfig.model_validate_json(section)
    rows = _base_rows(model)
    if model.lora.rank:
        rows = with_adapters(rows, model)
    for extension in extensions:
        rows = extension.table(rows, model)
    assert all(name == row.name for name, row in rows.items())
    return MappingProxyType(rows)


@functools.lru_cache(maxsize=4096)
def _held(section: str, extensions: tuple[Extension, ...], layers: range, degree: int) -> Held:
    sizes = Counter[bool]()
    four_bit = 0
    in_parts = Counter[str]()
    for row in _table(section, extensions).values():
        if any(layer in layers for layer in row.layers):
            size = math.prod(row.local_shape(degree))
            sizes[row.trained] += size
            four_bit += size * row.is_four_bit
            in_parts[row.gradient_in_parts] += size * row.trained
    return Held(sizes[True], sizes[False], four_bit, in_parts)


def _base_rows(model: ModelConfig) -> dict[str, Parameter]:
    """Rows of the transformer itself. Initial weights are drawn by the names that parameters had in format 1: layer's
    index, module, parameter."""
    assert isinstance(model.vocab_size, int)
    last = model.num_layers + 1
    vocabulary = Parameter(
        name=EMBEDDING,
        shape=(model.vocab_size, model.hidden_size),
        layers=(0, last) if model.tie_embeddings else (0,),
        initial=Initial("normal", model.init_std),
        split={"tensor": Split(0)},
        vocab_divisor=model.vocab_divisor,
        seed_name="0.word_embeddings.weight",
    )
    rows = {EMBEDDING: vocabulary}
    of_a_layer = _layer_rows(model)
    for layer in range(model.num_layers):
        for row in of_a_layer:
            name = layer_prefix(layer) + row.name
            rows[name] = replace(row, name=name, layers=(layer + 1,), seed_name=f"{layer + 1}.layer.{row.name}")
    rows[FINAL_NORM] = Parameter(
        name=FINAL_NORM,
        shape=(model.hidden_size,),
        layers=(last,),
        initial=ONES,  # its gradient is whole: it sees the gathered positions
        decay=False,
        seed_name=f"{last}.final_norm.weight",
    )
    if not model.tie_embeddings:
        rows[OUTPUT] = replace(vocabulary, name=OUTPUT, layers=(last,), seed_name=f"{last}.vocabulary_weight")
    return rows


def _layer_rows(model: ModelConfig) -> list[Parameter]:
    """Rows of one transformer layer, by their names in it. Megatron's scheme of initial values: N(0, σ²) matrices, with
    σ / √(2 · layers) for projections into the residual stream."""
    hidden = model.hidden_size
    head_dim = model.kv_channels
    ffn = model.ffn_hidden_size
    qkv = (model.num_heads + 2 * model.num_kv_heads) * head_dim
    matrix = Initial("normal", model.init_std)
    into_residual = Initial("normal", model.init_std / (2 * model.num_layers) ** 0.5)
    by_rows = {"tensor": Split(0)}
    by_columns = {"tensor": Split(1)}

    def norm(name: str, width: int, gradient_in_parts: str) -> Parameter:
        return Parameter(
            name=name, shape=(width,), layers=(), initial=ONES, gradient_in_parts=gradient_in_parts, decay=False
        )

    def weight(name: str, shape: Shape, initial: Initial, split: Mapping[str, Split]) -> Parameter:
        return Parameter(name=name, shape=shape, layers=(), initial=initial, split=split, decay=len(shape) > 1)

    rows = [
        norm("input_layernorm.weight", hidden, "sequence"),
        # for each group of queries that share a key and a value, [q…, k, v]: it splits by group
        weight("self_attention.linear_qkv.weight", (qkv, hidden), matrix, by_rows),
    ]
    if model.qkv_bias:
        rows.append(weight("self_attention.linear_qkv.bias", (qkv,), ZEROS, by_rows))
    if model.qk_norm:
        rows.append(norm("self_attention.q_layernorm.weight", head_dim, "always"))
        rows.append(norm("self_attention.k_layernorm.weight", head_dim, "always"))
    return [
        *rows,
        weight("self_attention.linear_proj.weight", (hidden, model.num_heads * head_dim), into_residual, by_columns),
        norm("pre_mlp_layernorm.weight", hidden, "sequence"),
        # [gate; up], each split for itself
        weight("mlp.linear_fc1.weight", (2 * ffn, hidden), matrix, {"tensor": Split(0, interleave=2)}),
        weight("mlp.linear_fc2.weight", (hidden, ffn), into_residual, by_columns),
    ]
