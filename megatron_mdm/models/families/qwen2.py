"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from megatron_mdm.models.families.causal import DEFAULTS, FIELDS, KEYS, QWEN_FIXED, QWEN_SILENT, CausalFamily

QWEN2 = CausalFamily(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=KEYS,
    fields=FIELDS,
    fixed={**QWEN_FIXED, "use_mrope": (False,)},
    silent=QWEN_SILENT | {"attention_bias"},  # transformers does not read it: q, k and v always have biases
    defaults=DEFAULTS,
    implies={"qkv_bias": True},
)
