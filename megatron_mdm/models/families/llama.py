"""Llama 1 to 3.0: autoregressive checkpoints, as the initialisation of a masked-diffusion model."""

from megatron_mdm.models.families.causal import DEFAULTS, FIELDS, FIXED, KEYS, CausalFamily

LLAMA = CausalFamily(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=KEYS,
    fields=FIELDS,
    fixed={**FIXED, "attention_bias": (False,), "mlp_bias": (False,)},
    silent=frozenset({"pretraining_tp"}),  # how the products were split; not what they are
    defaults=DEFAULTS,
)
