"""LLaDA (upstream: configuration_llada.py, modeling_llada.py): OLMo's names, the llama block, bidirectional."""

from __future__ import annotations

from megatron_mdm.models.families.family import Family, Json, Keys, check_number

KEYS = Keys(
    embedding="model.transformer.wte.weight",
    final_norm="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight",
    layer="model.transformer.blocks.{}.",
    input_norm="attn_norm.weight",
    mlp_norm="ff_norm.weight",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="attn_out",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)
FIELDS = {
    "num_layers": "n_layers",
    "hidden_size": "d_model",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "ffn_hidden_size": "mlp_hidden_size",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_sequence_length",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "weight_tying",
}
FIXED = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_dropout": (0.0,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "embedding_dropout": (0.0,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (None, False),
    "residual_dropout": (0.0,),
    "rope": (True,),
    "scale_logits": (False,),
}
SILENT = frozenset(
    [
        "alibi_bias_max",
        "attention_layer_norm_with_affine",
        "embedding_size",
        "flash_attention",
        "init_cutoff_factor",
        "init_device",
        "init_fn",
        "init_std",
        "mlp_ratio",
        "precision",
        "rope_full_precision",
    ]
)
DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": False}


class LladaFamily(Family):
    """The table has embedding_size rows where that is given; heads and MLP width have OLMo's other spellings."""

    def flatten(self, config: Json, where: str) -> Json:
        flat = dict(config)
        flat["vocab_size"] = flat.get("embedding_size") or flat.get("vocab_size")
        flat.setdefault("n_kv_heads", flat.get("n_heads"))
        if "mlp_hidden_size" not in flat and flat.get("mlp_ratio") and flat.get("d_model"):
            for name in ("mlp_ratio", "d_model"):
                check_number(name, flat[name], where)
            flat["mlp_hidden_size"] = flat["mlp_ratio"] * flat["d_model"]
        return flat

    def unflatten(self, base: Json, changes: Json) -> Json:
        result = {**base, **changes}
        if "vocab_size" in changes:
            result["embedding_size"] = changes["vocab_size"]
        return result


LLADA = LladaFamily(
    name="llada",
    architecture="LLaDAModelLM",
    model_type="llada",
    keys=KEYS,
    fields=FIELDS,
    fixed=FIXED,
    silent=SILENT,
    defaults=DEFAULTS,
    mask_id=126336,
)
