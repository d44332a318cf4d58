"""Rows of the table that low-rank adapters add, derived from the matrices that they stand beside.

A matrix W [out, in] gets A [r, in] and B [out, r]. Of a matrix that is split by rows, B is split like it, of one that
is split by columns, A; the other one is whole on every rank. The parts of a fused matrix, which are matrices of their
own in every family, have adapters of their own, so that PEFT's files map one to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.families import FAMILIES
from megatron_mdm.models.rows import EMBEDDING, OUTPUT, ZEROS, Initial, Parameter, layer_prefix
from megatron_mdm.models.sharding import Split

# A layer's linear maps by their module, and what each consists of: names of families.family.Keys.
LINEAR_MAPS = {
    "self_attention.linear_qkv": ("query", "key", "value"),
    "self_attention.linear_proj": ("output",),
    "mlp.linear_fc1": ("gate", "up"),
    "mlp.linear_fc2": ("down",),
}
SPLIT_BY_COLUMNS = ("output", "down")
TABLES = {"embedding": EMBEDDING, "head": OUTPUT}
TARGETS = (*(part for parts in LINEAR_MAPS.values() for part in parts), *TABLES)


class Adapter(NamedTuple):
    """Where the adapter of one matrix is in the table: names of its rows."""

    target: str  # of TARGETS
    layer: int  # −1 where the target is none of a layer
    a: str
    b: str


def targets_of(model: ModelConfig) -> frozenset[str]:
    """Of TARGETS, what model.lora.targets names in our words or a family's; none where there are no adapters. Raises
    UserError naming an unknown one, or a table of tied embeddings."""
    if not model.lora.rank:
        return frozenset()
    names = {name: name for name in TARGETS}
    for family in FAMILIES.values():
        for part in (part for parts in LINEAR_MAPS.values() for part in parts):
            names[getattr(family.keys, part)] = part  # self_attn.q_proj
            names[getattr(family.keys, part).rpartition(".")[2]] = part  # q_proj
    for name in model.lora.targets:
        if name not in names:
            raise UserError(f"'model.lora.targets': no matrix is named '{name}'; there are {', '.join(sorted(names))}")
    targets = frozenset(names[name] for name in model.lora.targets)
    if model.tie_embeddings and targets & TABLES.keys():
        named = ", ".join(sorted(targets & TABLES.keys()))
        raise UserError(f"'model.lora.targets' {named}: embedding and head are one table ('model.tie_embeddings')")
    return targets


def adapters_of(model: ModelConfig) -> Iterator[Adapter]:
    """Every adapter of the model, in the layers' order."""
    targets = targets_of(model)
    if "embedding" in targets:
        prefix = EMBEDDING.removesuffix("weight")
        yield Adapter("embedding", -1, prefix + "lora_embedding_A.weight", prefix + "lora_embedding_B")
    for layer in range(model.num_layers):
        for module, parts in LINEAR_MAPS.items():
            for part in (part for part in parts if part in targets):
                name = f"{layer_prefix(layer)}{module}.lora_{part}"
                yield Adapter(part, layer, f"{name}_A", f"{name}_B")
    if "head" in targets:
        prefix = OUTPUT.removesuffix("weight") + "adapter."
        yield Adapter("head", -1, prefix + "lora_head_A", prefix + "lora_head_B")


def matrix_shape(model: ModelConfig, target: str) -> tuple[int, int]:
    """(outputs, inputs) of a target's matrix."""
    assert isinstance(model.vocab_size, int)
    hidden = model.hidden_size
    ffn = model.ffn_hidden_size
    query = model.num_heads * model.kv_channels
    key = model.num_kv_heads * model.kv_channels
    return {
        "query": (query, hidden),
        "key": (key, hidden),
        "value": (key, hidden),
        "output": (hidden, query),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
        "embedding": (model.vocab_size, hidden),
        "head": (model.vocab_size, hidden),
    }[target]


def with_adapters(rows: dict[str, Parameter], model: ModelConfig) -> dict[str, Parameter]:
    """The table of a model whose own parameters are frozen, with those of its adapters behind the matrices' layers."""
    of_layers: dict[tuple[int, ...], list[Parameter]] = {}
    for adapter in adapters_of(model):
        row_a, row_b = _adapter_rows(adapter, model, rows)
        of_layers.setdefault(row_a.layers, []).extend([row_a, row_b])
    result: dict[str, Parameter] = {}
    for name, row in rows.items():
        is_four_bit = model.lora.base == "nf4" and name.endswith(tuple(f".{module}.weight" for module in LINEAR_MAPS))
        result[name] = replace(row, trained=False, is_base=True, is_four_bit=is_four_bit)
    for row in (row for group in of_layers.values() for row in group):
        result[row.name] = row
    order = sorted(result, key=lambda name: result[name].layers[0])
    return {name: result[name] for name in order}


def _adapter_rows(adapter: Adapter, model: ModelConfig, rows: dict[str, Parameter]) -> tuple[Parameter, Parameter]:
    """Initial values are PEFT's: the product is zero, A (of an embedding, B) is random."""
    rank = model.lora.rank
    outputs, inputs = matrix_shape(model, adapter.target)
    if adapter.target in TABLES:
        return _table_rows(adapter, rows[TABLES[adapter.target]], rank, inputs)
    layers = (adapter.layer + 1,)
    first = Initial("uniform", (3 * inputs) ** -0.5)  # between ± 1 / √inputs
    if adapter.target in SPLIT_BY_COLUMNS:
        a = Parameter(name=adapter.a, shape=(rank, inputs), layers=layers, initial=first, split={"tensor": Split(1)})
        b = Parameter(name=adapter.b, shape=(outputs, rank), layers=layers, initial=ZEROS, gradient_in_parts="sequence")
    else:
        a = Parameter(name=adapter.a, shape=(rank, inputs), layers=layers, initial=first, gradient_in_parts="sequence")
        b = Parameter(name=adapter.b, shape=(outputs, rank), layers=layers, initial=ZEROS, split={"tensor": Split(0)})
    return a, b


def _table_rows(adapter: Adapter, table: Parameter, rank: int, hidden: int) -> tuple[Parameter, Parameter]:
    """Those of the embedding, whose A is kept as its transpose [vocabulary, r], and of the head."""
    by_rows = replace(table, shape=(table.shape[0], rank), seed_name="", initial=ZEROS)
    if adapter.target == "embedding":
        b = Parameter(
            name=adapter.b,
            shape=(hidden, rank),
            layers=table.layers,
            initial=Initial("normal", 1.0),
            gradient_in_parts="sequence",
        )
        return replace(by_rows, name=adapter.a), b
    a = Parameter(
        name=adapter.a,
        shape=(rank, hidden),
        layers=table.layers,
        initial=Initial("uniform", (3 * hidden) ** -0.5),
        gradient_in_parts="always",
    )
    return a, replace(by_rows, name=adapter.b)
