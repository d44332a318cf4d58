"""Greedy decoding with a cache against decoding without one."""

from __future__ import annotations

import pytest

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from tests.ranks import run_ranks
from tests.small import MASK, PAD, small_model

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]
LENGTH = 10
NO_EOS = SpecialIds(MASK, PAD)


def built_engine():
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize, world_size_from_environment

    context = initialize(ParallelConfig(tensor=world_size_from_environment()))
    model = small_model(init_std=0.3, attention="causal")
    built = build_model(model, ParallelConfig(tensor=context.layout.tensor), context, 3)
    return InferenceEngine(built, "fp32"), context


def decoded_without_cache() -> list[list[int]]:
    """One prompt at a time, the whole row in every pass."""
    import torch

    from megatron_mdm.batch import Full
    from megatron_mdm.engine.inputs import logits_inputs

    engine, _ = built_engine()
    responses = []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(LENGTH):
            last = torch.arange(len(row))[None] == len(row) - 1
            logits = engine.logits(logits_inputs(torch.tensor([row]), Full(causal=True), last))
            logits[:, MASK] = float("-inf")
            row.append(int(logits.argmax()))
        responses.append(row[len(prompt) :])
    return responses


def decoded(special: SpecialIds, batch_size: int, temperature: float = 0.0) -> list[list[int]]:
    from megatron_mdm.generation.autoregressive import decode_greedily
    from megatron_mdm.generation.generate import generate

    engine, context = built_engine()
    config = GenerationConfig(
        gen_length=LENGTH, block_length=LENGTH, steps=LENGTH, batch_size=batch_size, temperature=temperature
    )
    responses = generate(engine, PROMPTS, config, special, context, decode_greedily)
    assert all(response.steps == len(response.tokens) for response in responses)
    return [response.tokens for response in responses]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return run_ranks(decoded_without_cache, 1)[0]


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 1), (1, 5), (4, 2)])
def test_cached_equals_uncached(num_ranks: int, batch_size: int, expected: list[list[int]]) -> None:
    """Alone, in one batch of different lengths, and on tensor 2 × data 2."""
    for responses in run_ranks(decoded, num_ranks, NO_EOS, batch_size):
        assert responses == expected


def test_a_response_ends_with_its_first_end_token(expected: list[list[int]]) -> None:
    eos = expected[0][LENGTH // 2]
    end_of_turn = expected[1][LENGTH // 4]
    responses = run_ranks(decoded, 1, SpecialIds(MASK, PAD, eos, frozenset({end_of_turn})), 5)[0]
    for response, whole in zip(responses, expected):
        ends = [place for place, token in enumerate(whole) if token in (eos, end_of_turn)]
        assert response == whole[: ends[0] + 1 if ends else None]
    assert len(responses[0]) < LENGTH
    assert len(responses[1]) < LENGTH


def test_draws_do_not_depend_on_the_batch(expected: list[list[int]]) -> None:
    alone = run_ranks(decoded, 1, NO_EOS, 1, 1.0)[0]
    assert run_ranks(decoded, 1, NO_EOS, 3, 1.0)[0] == alone
    assert alone != expected
