"""Which rows of which tensors of a family make up each of our parameters, and the reverse."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_rows import LINEAR_MAPS
from megatron_mdm.models.families.family import Family, Keys
from megatron_mdm.models.parameters import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix, parameter_table
from megatron_mdm.models.sharding import Shape


class RowRange(NamedTuple):
    """Rows [start, stop) of a tensor."""

    name: str
    start: int
    stop: int


def our_parameters(family: Family, model: ModelConfig) -> dict[str, list[RowRange]]:
    """Our parameter (whole) → the rows of the family's tensors that it consists of, in order. Those that an extension
    adds are none of the family's."""
    keys = family.keys
    table = parameter_table(model)
    sources = {EMBEDDING: keys.embedding, FINAL_NORM: keys.final_norm, OUTPUT: keys.head}
    for layer in range(model.num_layers):
        theirs = keys.layer.format(layer)
        sources |= {layer_prefix(layer) + ours: theirs + name for ours, name in _plain(keys).items()}
    ranges = {name: [RowRange(sources[name], 0, row.shape[0])] for name, row in table.items() if name in sources}
    for layer in range(model.num_layers):
        ours = layer_prefix(layer)
        theirs = keys.layer.format(layer)
        for kind in ("weight", "bias"):
            ranges[f"{ours}self_attention.linear_qkv.{kind}"] = _interleaved(keys, model, theirs, kind)
        width = model.ffn_hidden_size
        ranges[ours + "mlp.linear_fc1.weight"] = [
            RowRange(f"{theirs}{name}.weight", 0, width) for name in (keys.gate, keys.up)
        ]
    return {name: ranges[name] for name in table if name in ranges}


def family_tensors(family: Family, model: ModelConfig) -> dict[str, list[RowRange]]:
    """The family's tensor → the rows of our parameters that it consists of, in order: the reverse map."""
    parts: dict[str, list[tuple[int, RowRange]]] = {}
    for ours, ranges in our_parameters(family, model).items():
        row = 0
        for name, start, stop in ranges:
            parts.setdefault(name, []).append((start, RowRange(ours, row, row + stop - start)))
            row += stop - start
    return {name: [part for _, part in sorted(rows)] for name, rows in parts.items()}


def family_shapes(family: Family, model: ModelConfig) -> dict[str, Shape]:
    """The shape that each of the family's tensors has."""
    ours = parameter_table(model)
    return {
        name: (sum(part.stop - part.start for part in parts), *ours[parts[0].name].shape[1:])
        for name, parts in family_tensors(family, model).items()
    }


def matrices(family: Family, model: ModelConfig) -> dict[str, tuple[str, int]]:
    """Each of the family's weights that an adapter can stand beside → (target: of adapter_rows.TARGETS, layer; −1 where
    it is none of a layer)."""
    keys = family.keys
    names = {keys.embedding: ("embedding", -1), keys.head: ("head", -1)}
    for layer in range(model.num_layers):
        for target in (target for parts in LINEAR_MAPS.values() for target in parts):
            names[f"{keys.layer.format(layer)}{getattr(keys, target)}.weight"] = (target, layer)
    return names


def _plain(keys: Keys) -> dict[str, str]:
    """A layer's parameters that are a tensor of the family as it is."""
    return {
        "input_layernorm.weight": keys.input_norm,
        "pre_mlp_layernorm.weight": keys.mlp_norm,
        "self_attention.linear_proj.weight": f"{keys.output}.weight",
        "self_attention.q_layernorm.weight": f"{keys.query_norm}.weight",
        "self_attention.k_layernorm.weight": f"{keys.key_norm}.weight",
        "mlp.linear_fc2.weight": f"{keys.down}.weight",
    }


def _interleaved(keys: Keys, model: ModelConfig, prefix: str, kind: str) -> list[RowRange]:
    """linear_qkv: for each group of queries that share a key and a value, [q…, k, v]."""
    size = model.kv_channels
    per_group = model.num_heads // model.num_kv_heads
    widths = ((keys.query, per_group * size), (keys.key, size), (keys.value, size))
    return [
        RowRange(f"{prefix}{name}.{kind}", group * width, (group + 1) * width)
        for group in range(model.num_kv_heads)
        for name, width in widths
    ]
