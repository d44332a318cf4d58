"""Small Hugging Face checkpoints of every family, with random weights, made with transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 60
MASK = 57
EOS = 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
# name → (transformers' class, its configuration's extras)
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    # As many keys as queries, which could be exchanged unseen, and an eps that is far from every default.
    "llama_multi_head": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 0.03}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 0.03}),
    "dream": ("Qwen2", {}),
    "llada": ("Llama", {}),
    "mmada": ("Llama", {}),
}
_LLADA_NAMES = (
    ("model.layers.", "model.transformer.blocks."),
    ("model.embed_tokens", "model.transformer.wte"),
    ("model.norm", "model.transformer.ln_f"),
    ("lm_head", "model.transformer.ff_out"),
    ("self_attn.o_proj", "attn_out"),
    ("self_attn.", ""),
    ("mlp.gate_proj", "ff_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "ff_out"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ff_norm"),
)
_LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": EOS,
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
    "mask_token_id": MASK,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "pad_token_id": 0,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}


def write_checkpoint(folder: Path, family: str, dtype: torch.dtype = torch.float32, shard_size: str = "30KB") -> Path:
    """A checkpoint in several files; reference_logits has what it computes."""
    model = reference_model(family).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if family in ("llada", "mmada", "dream"):
        _rename(folder, family)
    return folder


def reference_logits(family: str, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits of the same weights, every position seeing every other. [R, S, V]"""
    everything = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
    with torch.no_grad():
        logits = reference_model(family)(tokens, attention_mask=everything).logits
    return torch.cat([logits[:, :1], logits[:, :-1]], 1) if family == "dream" else logits


def reference_model(family: str) -> Any:
    import transformers

    name, extras = REFERENCES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extras}, attn_implementation="sdpa")
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # biases and norms as well, which transformers starts at 0 and 1
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def _rename(folder: Path, family: str) -> None:
    """The files of a Llama or Qwen2 checkpoint with another family's names and configuration."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if family == "dream":
        config |= {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": MASK}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return
    names: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        tensors = {llada_name(name): tensor for name, tensor in load_file(path).items()}
        names |= dict.fromkeys(tensors, path.name)
        save_file(tensors, path, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = dict(_LLADA_CONFIG)
    if family == "mmada":
        config |= {"architectures": ["MMadaModelLM"], "model_type": "mmada", "codebook_size": 8, "num_vq_tokens": 4}
        config |= {"new_vocab_size": VOCAB, "vocab_size": VOCAB - 8, "embedding_size": VOCAB - 8}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def llada_name(name: str) -> str:
    for theirs, llada in _LLADA_NAMES:
        name = name.replace(theirs, llada)
    return name
