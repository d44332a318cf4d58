"""Qwen3: each head's query and key are normalised, and heads have a width of their own."""

from megatron_mdm.models.families.causal import DEFAULTS, FIELDS, KEYS, QWEN_FIXED, QWEN_SILENT, CausalFamily

QWEN3 = CausalFamily(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=KEYS,
    fields=FIELDS,
    fixed={**QWEN_FIXED, "attention_bias": (False,)},
    silent=QWEN_SILENT,
    defaults={**DEFAULTS, "head_dim": 128},
    implies={"qk_norm": True},
)
