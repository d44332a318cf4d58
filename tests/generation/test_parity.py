"""Responses against a reference written from LLaDA's rules: one prompt at a time, dense, on transformers' Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from tests.models.test_stages import llama_logits, llama_of
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, small_model

MODEL = small_model(init_std=0.3, num_layers=2)
PROMPTS = [[5, 6, 7, 20, 21], [8, 9], [10, 11, 12, 13, 14, 15, 16]]
SETTINGS: list[dict[str, Any]] = [
    {"gen_length": 8, "block_length": 8, "steps": 8},
    {"gen_length": 16, "block_length": 4, "steps": 8},
    {"gen_length": 12, "block_length": 6, "steps": 8},  # 6 tokens in 4 steps: 2, 2, 1, 1
    {"gen_length": 12, "block_length": 12, "steps": 5, "cfg_scale": 0.5},
    {"gen_length": 8, "block_length": 2, "steps": 4, "cfg_scale": 2.0},
    {"gen_length": 8, "block_length": 4, "steps": 8, "eos": "forbidden"},
    {"gen_length": 12, "block_length": 6, "steps": 12, "threshold": 0.3},
]


def reference(llama: Any, prompt: list[int], settings: dict[str, Any]) -> list[int]:
    gen_length, block_length = settings["gen_length"], settings["block_length"]
    num_blocks = gen_length // block_length
    steps = settings["steps"] // num_blocks
    row = torch.tensor(prompt + [MASK] * gen_length)
    for block in range(num_blocks):
        first = len(prompt) + block * block_length
        in_block = torch.zeros(len(row), dtype=torch.bool)
        in_block[first : first + block_length] = True
        step = 0
        while (row[in_block] == MASK).any():
            logits = llama_logits(MODEL, llama, row[None])[0]
            if settings.get("cfg_scale"):
                blind = row.clone()
                blind[: len(prompt)] = MASK
                unconditional = llama_logits(MODEL, llama, blind[None])[0]
                logits = unconditional + (settings["cfg_scale"] + 1) * (logits - unconditional)
            logits[:, MASK] = -torch.inf
            if settings.get("eos") == "forbidden":
                logits[:, EOS] = -torch.inf
            candidate = logits.argmax(1)
            confidence = logits.softmax(1).gather(1, candidate[:, None])[:, 0]
            confidence[~in_block | (row != MASK)] = -torch.inf
            if settings.get("threshold"):
                sure = (confidence >= settings["threshold"]).nonzero()[:, 0]
                best = sure if len(sure) else confidence.argmax()[None]
            else:
                commit = block_length // steps + (step < block_length % steps)
                best = confidence.topk(commit).indices
            row[best] = candidate[best]
            step += 1
    return row[len(prompt) :].tolist()


def ours() -> tuple[list[list[list[int]]], dict[str, Any]]:
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.generation.generate import generate
    from megatron_mdm.models.stages import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize(1)
    engine = InferenceEngine(build_model(MODEL, ParallelConfig(), context, 5), "fp32")
    responses = []
    for settings in SETTINGS:
        config, special = GenerationConfig(batch_size=2, **settings), SpecialIds(MASK, PAD, EOS)
        responses.append([response.tokens for response in generate(engine, PROMPTS, config, special, context)])
    return responses, {name: parameter.detach().numpy() for name, parameter in engine.model.named_parameters()}


@pytest.fixture(scope="module")
def results() -> tuple[list[list[list[int]]], Any]:
    responses, parameters = run_ranks(ours, 1)[0]
    return responses, llama_of(MODEL, {name: torch.from_numpy(value) for name, value in parameters.items()})


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=lambda index: str(SETTINGS[index]))
def test_same_tokens_as_the_reference(index: int, results: tuple[list[list[list[int]]], Any]) -> None:
    responses, llama = results
    assert responses[index] == [reference(llama, prompt, SETTINGS[index]) for prompt in PROMPTS]
