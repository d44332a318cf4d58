"""Responses against the published samplers, on transformers' Llama: 96 prompts of two lengths, token for token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from tests.generation.published import LogitsOf, dream, llada
from tests.models.test_layers import llama_logits, llama_of
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, VOCAB, small_model

LLADA, DREAM = (small_model(init_std=0.3, logit_shift=shift) for shift in (False, True))
EOT = 17
LENGTHS = (2, 7)
ROWS = 48
LLADA_SETTINGS: list[dict[str, Any]] = [
    {"gen_length": 8, "block_length": 8, "steps": 8},
    {"gen_length": 16, "block_length": 4, "steps": 8},
    {"gen_length": 12, "block_length": 6, "steps": 8},  # 6 tokens in 4 steps: 2, 2, 1, 1
    {"gen_length": 12, "block_length": 12, "steps": 5, "cfg_scale": 0.5},
    {"gen_length": 8, "block_length": 2, "steps": 4, "cfg_scale": 2.0},
    {"gen_length": 8, "block_length": 4, "steps": 8, "eos": "forbidden"},
    {"gen_length": 8, "block_length": 4, "steps": 8, "eos": "last"},
    {"gen_length": 9, "block_length": 9, "steps": 3, "eos": "last", "cfg_scale": 0.5},
    {"gen_length": 12, "block_length": 6, "steps": 12, "threshold": 0.3},
    {"gen_length": 8, "block_length": 4, "steps": 8, "temperature": 0.8},
    {"gen_length": 8, "block_length": 4, "steps": 4, "remasking": "random", "temperature": 0.3},
]
DREAM_SETTINGS: list[dict[str, Any]] = [
    {"remasking": alg, "gen_length": 12, "steps": steps, **changes}
    for alg, steps, changes in [
        ("maskgit_plus", 12, {}),
        ("maskgit_plus", 7, {"temperature": 0.6, "top_p": 0.8}),
        ("maskgit_plus", 5, {"top_k": 3}),
        ("entropy", 12, {}),
        ("entropy", 20, {}),  # more steps than tokens: some commit nothing
        ("entropy", 6, {"temperature": 0.2, "top_p": 0.95, "alg_temp": 0.3}),
        ("topk_margin", 12, {}),
        ("topk_margin", 8, {"temperature": 1.0, "top_k": 8, "alg_temp": 0.05}),
        ("origin", 12, {}),
        ("origin", 6, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}),
    ]
]


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, MASK, length).tolist() for length in LENGTHS for _ in range(ROWS)]


def ours(model: ModelConfig, settings: list[dict[str, Any]]) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """The responses to all prompts by setting; the model's parameters."""
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.generation.generate import generate
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    engine = InferenceEngine(build_model(model, ParallelConfig(), context, 5), "fp32")
    responses = []
    for changes in settings:
        config = GenerationConfig(batch_size=20, **changes)
        special = SpecialIds(MASK, PAD, EOS, frozenset({EOT}))
        responses.append([response.tokens for response in generate(engine, prompts(), config, special, context)])
    return responses, {name: parameter.detach().numpy() for name, parameter in engine.model.named_parameters()}


def published(sampler: Any, logits_of: LogitsOf, settings: dict[str, Any]) -> list[list[int]]:
    """The same from a published sampler, prompts of one length at a time."""
    responses = []
    for group in range(len(LENGTHS)):
        rows = torch.tensor(prompts()[group * ROWS : (group + 1) * ROWS])
        responses += sampler(logits_of, rows, settings, MASK, partial(noise, group * ROWS)).tolist()
    return responses


def noise(first: int, step: int, row: int, num_masked: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise as the sampler draws it: a function of the prompt and the step."""
    generator = stream(0, Purpose.GENERATION, step, first + row)
    return generator.random(num_masked), generator.random((num_masked, VOCAB))


@pytest.fixture(scope="module")
def of_llada() -> tuple[list[list[list[int]]], LogitsOf]:
    responses, parameters = run_ranks(ours, 1, LLADA, LLADA_SETTINGS)[0]
    llama = llama_of(LLADA, {name: torch.from_numpy(value) for name, value in parameters.items()})
    return responses, partial(llama_logits, LLADA, llama)


@pytest.mark.parametrize("index", range(len(LLADA_SETTINGS)), ids=lambda index: str(LLADA_SETTINGS[index]))
def test_same_tokens_as_llada(index: int, of_llada: tuple[list[list[list[int]]], LogitsOf]) -> None:
    settings = LLADA_SETTINGS[index]
    ends = {"forbidden": {"logits_inf": (EOS,)}, "last": {"confidence_inf": (EOS, EOT)}}.get(
        settings.get("eos", ""), {}
    )
    expected = published(partial(llada, **ends), of_llada[1], settings)
    different = [row for row, response in enumerate(expected) if response != of_llada[0][index][row]]
    assert not different, f"{len(different)} of {len(expected)} rows"


@pytest.fixture(scope="module")
def of_dream() -> tuple[list[list[list[int]]], LogitsOf]:
    settings = [{"block_length": 12, "schedule": "epsilon", **changes} for changes in DREAM_SETTINGS]
    responses, parameters = run_ranks(ours, 1, DREAM, settings)[0]
    llama = llama_of(DREAM, {name: torch.from_numpy(value) for name, value in parameters.items()})

    def shifted(tokens: torch.Tensor) -> torch.Tensor:
        logits = llama_logits(DREAM, llama, tokens)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1)

    return responses, shifted


@pytest.mark.parametrize("index", range(len(DREAM_SETTINGS)), ids=lambda index: str(DREAM_SETTINGS[index]))
def test_same_tokens_as_dream(index: int, of_dream: tuple[list[list[list[int]]], LogitsOf]) -> None:
    expected = published(dream, of_dream[1], DREAM_SETTINGS[index])
    different = [row for row, response in enumerate(expected) if response != of_dream[0][index][row]]
    assert not different, f"{len(different)} of {len(expected)} rows"
