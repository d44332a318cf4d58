"""The stages against transformers' Llama with a full or causal mask, and against themselves under padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from tests.ranks import run_ranks
from tests.small import small_model


def llama_of(model: ModelConfig, parameters: dict[str, torch.Tensor]) -> Any:
    """transformers' LlamaForCausalLM with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    head_dim = model.hidden_size // model.num_heads
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            attn_implementation="sdpa",
        )
    ).float()
    state = {
        "model.embed_tokens.weight": parameters["0.word_embeddings.weight"][: model.vocab_size],
        "model.norm.weight": parameters[f"{model.num_layers + 1}.final_norm.weight"],
        "lm_head.weight": parameters.get(
            f"{model.num_layers + 1}.vocabulary_weight", parameters["0.word_embeddings.weight"]
        )[: model.vocab_size],
    }
    group = model.num_heads // model.num_kv_heads
    for layer in range(model.num_layers):
        ours = f"{layer + 1}.layer."
        theirs = f"model.layers.{layer}."
        qkv = parameters[ours + "self_attention.linear_qkv.weight"].view(model.num_kv_heads, group + 2, head_dim, -1)
        for name, part in (("q", qkv[:, :group]), ("k", qkv[:, group]), ("v", qkv[:, group + 1])):
            state[f"{theirs}self_attn.{name}_proj.weight"] = part.reshape(-1, model.hidden_size)
        gate, up = parameters[ours + "mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{theirs}self_attn.o_proj.weight": parameters[ours + "self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": parameters[ours + "mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": parameters[ours + "input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": parameters[ours + "pre_mlp_layernorm.weight"],
        }
    llama.load_state_dict(state)
    return llama


def llama_logits(model: ModelConfig, llama: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[R, S, V], with the model's kind of attention."""
    everything = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
    with torch.no_grad():
        return llama(tokens, attention_mask=everything if model.attention == "bidirectional" else None).logits


def our_logits(model: ModelConfig) -> dict[str, Any]:
    """On a rank: logits of every position, of a padded batch, and the parameters."""
    from megatron_mdm.batch import Full, Padded
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    torch.manual_seed(0)
    context = initialize()
    built = build_model(model, ParallelConfig(), context, 3)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    engine = InferenceEngine(built, "fp32")
    tokens = torch.randint(0, model.vocab_size, (3, 12))
    causal = model.attention == "causal"
    logits = engine.logits(logits_inputs(tokens, Full(causal=causal), torch.ones(3, 12, dtype=torch.bool)))
    padded = torch.cat([tokens, torch.zeros(3, 5, dtype=torch.int64)], 1)
    selected = torch.arange(17)[None, :].expand(3, 17) < 12
    with_padding = engine.logits(logits_inputs(padded, Padded(torch.full((3,), 12), causal=causal), selected))
    parameters = {name: parameter.detach().numpy() for name, parameter in built.named_parameters()}
    return {
        "tokens": tokens.numpy(),
        "logits": logits.numpy(),
        "with_padding": with_padding.numpy(),
        "parameters": parameters,
    }


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 4}, {"tie_embeddings": True}, {"rope_theta": 500.0}, {"attention": "causal"}]
)
def test_equals_llama(changes: dict[str, Any]) -> None:
    model = small_model(init_std=0.2, **changes)
    ours = run_ranks(our_logits, 1, model)[0]
    parameters = {name: torch.from_numpy(value) for name, value in ours["parameters"].items()}
    expected = llama_logits(model, llama_of(model, parameters), torch.from_numpy(ours["tokens"])).flatten(0, 1).numpy()
    np.testing.assert_allclose(ours["logits"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours["with_padding"], ours["logits"], rtol=1e-5, atol=1e-5)
