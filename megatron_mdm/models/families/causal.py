"""What Llama, Qwen and Dream share: transformers' names, and rotary settings in either of its spellings."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mdm.config.errors import UserError
from megatron_mdm.models.families.family import Family, Json, Keys, json_text, way_round

KEYS = Keys(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    layer="model.layers.{}.",
    input_norm="input_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
FIXED = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0,)}
# transformers' own, for config.json files that leave them out.
DEFAULTS = {"head_dim": 0, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_ROPE = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
_INERT_ROPE = {"factor": (1.0,), "partial_rotary_factor": (1.0,)}
QWEN_FIXED = {**FIXED, "use_sliding_window": (False,)}
QWEN_SILENT = frozenset({"max_window_layers", "sliding_window"})  # read only where use_sliding_window is true


class CausalFamily(Family):
    """rope_theta stands alone (transformers 4) or inside rope_parameters (transformers 5)."""

    def without(self, config: Json, ignored: Sequence[str]) -> Json:
        """rope_theta is kept where the field around it is ignored."""
        result = super().without(config, ignored)
        rope = config.get("rope_parameters")
        if "rope_parameters" in ignored and isinstance(rope, dict) and rope.get("rope_theta") is not None:
            result.setdefault("rope_theta", rope["rope_theta"])
        return result

    def flatten(self, config: Json, where: str) -> Json:
        flat = dict(config)
        for name in ("rope_scaling", "rope_parameters"):
            rope = flat.pop(name, {})
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
            if kind != "default" or not isinstance(rope, dict):
                raise UserError(
                    f"{where}: '{name}' of type {json_text(kind)} is not supported, only plain rotary "
                    f"positions{way_round(name)}"
                )
            for key, value in rope.items():
                if key not in _ROPE and value is not None and value not in _INERT_ROPE.get(key, ()):
                    raise UserError(f"{where}: '{name}.{key}' {json_text(value)} is not supported{way_round(name)}")
            if rope.get("rope_theta") is not None:
                flat["rope_theta"] = rope["rope_theta"]
        kinds = flat.pop("layer_types", [])
        other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
        if other:
            raise UserError(
                f"{where}: 'layer_types' has {json_text(other[0])}; only \"full_attention\" is "
                f"supported{way_round('layer_types')}"
            )
        if "num_attention_heads" in flat:  # Llama 1 and 2 leave it out
            flat.setdefault("num_key_value_heads", flat["num_attention_heads"])
        return flat

    def unflatten(self, base: Json, changes: Json) -> Json:
        result = dict(base)
        changes = dict(changes)
        if "rope_theta" in changes and "rope_theta" in (result.get("rope_parameters") or {}):
            result["rope_parameters"] = {**result["rope_parameters"], "rope_theta": changes.pop("rope_theta")}
        if "num_hidden_layers" in changes and result.get("layer_types"):
            result["layer_types"] = ["full_attention"] * changes["num_hidden_layers"]
        return result | changes
