"""Small Hugging Face models that the peft library has given adapters: what ours are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.checkpoint.huggingface_models import llada_name, reference_model

ALL_OF_LLADA = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
# name → (family, PEFT's settings). In a LLaDA, ff_out is each layer's down projection and the head.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "llama_all_linear": ("llama", {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"}),
    "llama_tables": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": ["up_proj", "embed_tokens", "lm_head"]}),
    "qwen2": ("qwen2", {"r": 4, "lora_alpha": 4, "target_modules": r".*\.self_attn\.[qv]_proj"}),
    "qwen2_all_linear": ("qwen2", {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"}),
    "llada": ("llada", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "llada_layers": (
        "llada",
        {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": r".*\.blocks\..*_(proj|out)"},
    ),
    "llada_all": ("llada", {"r": 2, "lora_alpha": 6, "target_modules": ["wte", *ALL_OF_LLADA]}),
}


def peft_model(name: str) -> Any:
    """A case's model with an adapter that is not the identity."""
    from peft import LoraConfig, get_peft_model

    family, settings = CASES[name]
    model = get_peft_model(base_model(family), LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def load_peft(family: str, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(family), str(folder)).eval()


def base_model(family: str) -> Any:
    model = reference_model(family)
    return LladaShaped(model) if family == "llada" else model


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """[R, S, V], every position seeing every other."""
    if isinstance(getattr(model, "base_model", model).model, LladaShaped):
        return model(input_ids=tokens)
    everything = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
    return model(tokens, attention_mask=everything).logits


class LladaShaped(nn.Module):
    """A LLaDA in torch, its modules named and called as in modeling_llada.py, with the weights of a Llama."""

    def __init__(self, llama: Any) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.config = PretrainedConfig()
        self.config.model_type = "llada"
        self.rotary = llama.model.rotary_emb
        sizes = llama.config
        hidden = sizes.hidden_size
        transformer: dict[str, nn.Module] = {
            "wte": nn.Embedding(sizes.vocab_size, hidden),
            "blocks": nn.ModuleList(_Block(sizes) for _ in range(sizes.num_hidden_layers)),
            "ln_f": nn.RMSNorm(hidden, eps=sizes.rms_norm_eps),
            "ff_out": nn.Linear(hidden, sizes.vocab_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(transformer)})
        weights = {llada_name(name): tensor for name, tensor in llama.state_dict().items()}
        self.load_state_dict(weights, strict=True)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks a model for it."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        transformer: Any = self.model["transformer"]
        hidden = transformer["wte"](input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        angles = self.rotary(hidden, positions)
        for block in transformer["blocks"]:
            hidden = block(hidden, angles)
        return transformer["ff_out"](transformer["ln_f"](hidden))


class _Block(nn.Module):
    def __init__(self, sizes: Any) -> None:
        super().__init__()
        hidden, ffn = sizes.hidden_size, sizes.intermediate_size
        self.head_dim = hidden // sizes.num_attention_heads
        keys = sizes.num_key_value_heads * self.head_dim
        self.attn_norm = nn.RMSNorm(hidden, eps=sizes.rms_norm_eps)
        self.ff_norm = nn.RMSNorm(hidden, eps=sizes.rms_norm_eps)
        for name, inputs, outputs in (
            ("q_proj", hidden, hidden),
            ("k_proj", hidden, keys),
            ("v_proj", hidden, keys),
            ("attn_out", hidden, hidden),
            ("ff_proj", hidden, ffn),
            ("up_proj", hidden, ffn),
            ("ff_out", ffn, hidden),
        ):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        normed = self.attn_norm(hidden)
        query, key, value = (self._heads(module(normed)) for module in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary_pos_emb(query, key, *angles)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        hidden = hidden + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(hidden)
        return hidden + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
