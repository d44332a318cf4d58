"""config.json files as they are published and as training tools leave them: what is accepted, told, and refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mdm.checkpoint.huggingface import model_section
from megatron_mdm.config.errors import UserError
from megatron_mdm.models.families import family_of

Json = dict[str, Any]
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA1 = {  # without groups, rotary base, biases
    "_name_or_path": "huggyllama/llama-7b",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": None,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DREAM = QWEN25 | {
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "eos_token_id": 151643,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "model_type": "Dream",
    "pad_token_id": 151643,
    "rope_scaling": None,
    "sliding_window": None,
    "use_mrope": False,
}
LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
MMADA = LLADA | {  # saved with everything that transformers' configurations once held
    "add_cross_attention": False,
    "architectures": ["MMadaModelLM"],
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "codebook_size": 8192,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "gradient_checkpointing": True,
    "is_decoder": False,
    "length_penalty": 1.0,
    "llm_vocab_size": 126464,
    "max_length": 20,
    "model_type": "mmada",
    "new_vocab_size": 134656,
    "num_beams": 1,
    "num_new_special_tokens": 0,
    "num_vq_tokens": 1024,
    "pretrained_model_path": "GSAI-ML/LLaDA-8B-Instruct",
    "pruned_heads": {},
    "return_dict": True,
    "temperature": 1.0,
    "top_k": 50,
    "torchscript": False,
    "w_clip_vit": False,
}
PUBLISHED = {"llama 3": LLAMA3, "llama 1": LLAMA1, "qwen 2.5": QWEN25, "qwen 3": QWEN3, "dream": DREAM}
PUBLISHED |= {"llada": LLADA, "mmada": MMADA}
LEFT_BY_TOOLS = {
    "_attn_implementation": "sdpa",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "_unsloth_fixed": 1,
    "attn_implementation": "flash_attention_2",
    "model_max_length": 4096,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "transformers.js_config": {"dtype": "q4"},
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
    "use_flash_attention_2": True,
}
NULL = {"quantization_config": None, "rope_scaling": None, "sliding_window": None, "some_new_field": None}
INERT = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "use_sliding_window": False}


def section(config: Json, *ignored: str) -> Json:
    return model_section(family_of(config, "c.json"), config, "c.json", ignored).model_dump(exclude={"ignore_fields"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    config = PUBLISHED[name]
    values = section(config)
    assert values["vocab_size"] == config.get("new_vocab_size", config["vocab_size"])
    assert values["num_kv_heads"] == config.get("num_key_value_heads", config.get("n_kv_heads", 32))
    assert family_of(config, "c.json").notes(config, "c.json") == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_says_nothing_changes_nothing(name: str) -> None:
    config = PUBLISHED[name]
    family = family_of(config, "c.json")
    assert section(
        {**config, **LEFT_BY_TOOLS, **NULL, **{key: value for key, value in INERT.items() if key not in config}}
    ) == section(config)
    (line,) = family.notes({**config, **LEFT_BY_TOOLS, **NULL}, "c.json")
    assert line.startswith("c.json: fields that training tools left are ignored: ")
    for field in ("_attn_implementation", "unsloth_fixed", "tokenizer_padding_side"):
        assert field in line
    for field in NULL:
        assert field not in line


REFUSED: list[tuple[Json, Json]] = [
    (LLAMA3, {"attention_bias": True}),
    (LLAMA3, {"mlp_bias": True}),
    (LLAMA3, {"partial_rotary_factor": 0.5}),
    (LLAMA3, {"quantization_config": {"bits": 4}}),
    (LLAMA3, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    (LLAMA3, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    (LLAMA3, {"rope_scaling": "default"}),
    (LLAMA3, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}}),
    (LLAMA3, {"pruned_heads": {"0": [1]}}),
    (QWEN25, {"use_sliding_window": True}),
    (QWEN25, {"layer_types": ["sliding_attention"]}),
    (QWEN25, {"layer_types": 5}),
    (QWEN3, {"num_experts": 8}),
    (LLADA, {"include_qkv_bias": True}),
    (LLADA, {"num_experts": 8}),
    (MMADA, {"w_clip_vit": True}),
]


@pytest.mark.parametrize(("config", "change"), REFUSED)
def test_what_may_change_the_function_is_refused_unless_it_is_ignored_by_name(config: Json, change: Json) -> None:
    (name,) = change
    with pytest.raises(UserError) as error:
        section({**config, **change})
    assert f"'{name}" in str(error.value)
    assert f"--ignore-fields {name}, or 'model.ignore_fields' [{name}]" in str(error.value)
    assert section({**config, **change}, name) == section(config)
    (line,) = family_of(config, "c.json").notes({**config, **change}, "c.json", [name])
    assert line.startswith(f"c.json: '{name}' ")
    assert line.endswith("is ignored, as was asked for")


def test_a_field_that_is_needed_or_absent_cannot_be_ignored() -> None:
    with pytest.raises(UserError, match="the field 'hidden_size' is missing"):
        section(LLAMA3, "hidden_size")
    with pytest.raises(UserError, match="has no field 'hiden_size' to ignore"):
        family_of(LLAMA3, "c.json").notes(LLAMA3, "c.json", ["hiden_size"])


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LLAMA3, {"head_dim": "128"}),
        (LLAMA3, {"num_attention_heads": [32]}),
        (LLAMA3, {"vocab_size": {"text": 5}}),
        (LLAMA3, {"rope_theta": True}),
        (LLADA, {"mlp_hidden_size": None, "mlp_ratio": "4"}),
        (LLADA, {"n_heads": "many"}),
        (LLADA, {"embedding_size": "x"}),
    ],
)
def test_a_field_that_is_no_number_is_named(config: Json, change: Json) -> None:
    with pytest.raises(UserError, match=r"c\.json: '\w+': expected a number, got"):
        section({**config, **change})


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", 5, ["Other"], {"a": 1}])
def test_architectures_of_any_form(architectures: Any) -> None:
    config = {**LLAMA3, "architectures": architectures}
    if architectures == "LlamaForCausalLM":
        assert section(config) == section(LLAMA3)
        return
    with pytest.raises(UserError, match=r"'architectures' .* is not supported, only LLaDAModelLM"):
        section(config)


def test_the_rotary_base_is_kept_where_the_field_around_it_is_ignored() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 3e5, "factor": 8.0}
    config = {**{name: value for name, value in LLAMA3.items() if "rope" not in name}, "rope_parameters": rope}
    assert section(config, "rope_parameters")["rope_theta"] == 3e5


def test_an_export_keeps_what_was_ignored() -> None:
    config = {**LLAMA3, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    family = family_of(config, "c.json")
    model = model_section(family, config, "c.json", ["rope_scaling"])
    assert family.write(model, config) == config
