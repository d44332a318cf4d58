"""Fields of config.json that say nothing about what the weights compute, whatever the family."""

from __future__ import annotations

import re
from typing import Any

# transformers' own.
_BOOKKEEPING = """
architectures auto_map model_type dtype torch_dtype transformers_version tokenizer_class finetuning_task problem_type
bos_token_id eos_token_id pad_token_id mask_token_id sep_token_id decoder_start_token_id
id2label label2id num_labels classifier_dropout prefix task_specific_params
initializer_range gradient_checkpointing use_cache use_return_dict return_dict output_attentions output_hidden_states
chunk_size_feed_forward is_decoder is_encoder_decoder tie_encoder_decoder add_cross_attention
cross_attention_hidden_size torchscript tf_legacy_loss use_bfloat16 attn_implementation _attn_implementation_autoset
_name_or_path
"""
# How to generate, which older versions wrote into config.json, too.
_GENERATION = """
max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences
diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id suppress_tokens
begin_suppress_tokens exponential_decay_length_penalty remove_invalid_values output_scores return_dict_in_generate
"""
BOOKKEEPING = frozenset(_BOOKKEEPING.split() + _GENERATION.split())
# Switches of other architectures, at the values by which they switch nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "attn_pdrop": (0.0,),
    "embd_pdrop": (0.0,),
    "hidden_dropout": (0.0,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "resid_pdrop": (0.0,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
# What training tools leave: notes to themselves, and the kernels and memory they ran with. Each is named in a warning.
_LEFT_BY_TOOLS = re.compile(
    r"_.*|unsloth_.*|axolotl.*|wandb.*|deepspeed.*|neftune_.*|freeze_.*|tokenizer_.*|transformers\.js.*|torch_compile.*"
    r"|use_flash_attn.*|use_flash_attention.*|flash_attn.*|attn_impl.*|use_liger.*|.*gradient_checkpointing.*"
    r"|model_max_length|max_seq_length|padding_side|pad_token|vocab_file|license|keys_to_ignore_at_inference"
)


def is_left_by_tools(name: str) -> bool:
    """Whether a field is one that training tools add to a config.json."""
    return name not in BOOKKEEPING and _LEFT_BY_TOOLS.fullmatch(name) is not None
