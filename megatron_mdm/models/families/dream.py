"""Dream: Qwen2's weights and names, bidirectional, and the logits that position i gives are for the token at i + 1."""

from megatron_mdm.models.families.causal import DEFAULTS, FIELDS, KEYS, QWEN_FIXED, QWEN_SILENT, CausalFamily

DREAM = CausalFamily(
    name="dream",
    architecture="DreamModel",
    model_type="Dream",
    keys=KEYS,
    fields={ours: theirs for ours, theirs in FIELDS.items() if ours != "head_dim"},
    fixed={**QWEN_FIXED, "use_mrope": (False,)},
    silent=QWEN_SILENT | {"attention_bias"},
    defaults=DEFAULTS,
    implies={"qkv_bias": True, "logit_shift": True},
    peft_task="",
    mask_id=151666,
)
