"""Denoising: counts, blocks, independence from the batch and from the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.generation.remask import COMMIT_SCHEDULES, REMASKING, cosine, gumbel_argmax, linear
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from megatron_mdm.models.cache import Window
from megatron_mdm.models.stages import Packet
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, VOCAB, small_model

SPECIAL = SpecialIds(MASK, PAD, EOS)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


class Recorder:
    """An engine whose logits favour token position + 2, most strongly at later positions; keeps what it saw."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []

    def logits(self, packet: Packet, window: Window | None = None) -> torch.Tensor:
        self.packets.append(packet._replace(tokens=packet.tokens.clone()))
        places = torch.arange(packet.tokens.shape[1]).expand_as(packet.tokens) if window is None else window.positions
        position = places[packet.selected]
        logits = torch.zeros(len(position), VOCAB)
        return logits.scatter_(1, (2 + position)[:, None], 1.0 + position[:, None].float())


def test_blocks_are_finished_left_to_right_and_the_most_confident_first() -> None:
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=4, steps=4)
    responses = denoise(engine, PROMPTS[:2], [0, 1], config, SPECIAL)
    starts = [3, 2]
    assert [response.tokens for response in responses] == [[2 + start + i for i in range(8)] for start in starts]
    masked = [packet.selected.sum(1).tolist() for packet in engine.packets]
    assert masked == [[4, 4], [2, 2], [4, 4], [2, 2]]
    second = engine.packets[1].tokens[0, 3:7] == MASK  # the later, more confident positions were committed first
    assert second.tolist() == [True, True, False, False]
    assert (engine.packets[1].tokens[0, 7:11] == MASK).all()


@pytest.mark.parametrize(("masked", "steps"), [(32, 32), (8, 3), (4, 8), (7, 7)])
def test_tokens_per_step(masked: int, steps: int) -> None:
    counts = linear(masked, steps)
    assert sum(counts) == masked
    assert len(counts) == steps
    assert sorted(counts, reverse=True) == counts
    assert max(counts) - min(counts) <= 1


def test_gumbel_rule_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    uniforms = torch.from_numpy(np.random.default_rng(0).random((40_000, 3)))
    shares = gumbel_argmax(logits.expand(40_000, 3), 1.0, uniforms).bincount(minlength=3) / 40_000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.01, rtol=0.0)
    assert gumbel_argmax(logits, 0.0, torch.empty(0)) == 2


@pytest.mark.parametrize("name", COMMIT_SCHEDULES)
@pytest.mark.parametrize(("masked", "steps"), [(32, 32), (8, 3), (4, 8), (1, 1)])
def test_every_schedule_commits_all(name: str, masked: int, steps: int) -> None:
    counts = COMMIT_SCHEDULES[name](masked, steps)
    assert (sum(counts), len(counts)) == (masked, steps)
    assert min(counts) >= (1 if steps <= masked else 0)


def test_cosine_schedule() -> None:
    """⌊16 · cos(π/8 · s)⌋ = 14, 11, 6, 0 stay masked."""
    assert cosine(16, 4) == [2, 3, 5, 6]


def generated(configs: list[GenerationConfig], tensor: int = 1, pipeline: int = 1) -> list[list[list[int]]]:
    """Of each setting, the responses to all prompts."""
    from megatron_mdm.generation.generate import generate

    engine, context = built_engine(tensor, pipeline)
    return [[response.tokens for response in generate(engine, PROMPTS, config, SPECIAL, context)] for config in configs]


def built_engine(tensor: int, pipeline: int):
    from megatron_mdm.engine.inference import InferenceEngine, PipelinedInferenceEngine, build_stages
    from megatron_mdm.models.stages import build_model
    from megatron_mdm.parallel.groups import initialize

    context, model = initialize(tensor, pipeline), small_model(init_std=0.3, num_layers=3)
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    if pipeline > 1:
        stages = build_stages(model, parallel, context, 3, 16)
        return PipelinedInferenceEngine(stages, model, "fp32", context), context
    return InferenceEngine(build_model(model, parallel, context, 3), "fp32"), context


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"remasking": "random"},
    {"cfg_scale": 1.5, "eos": "last"},
    {"threshold": 0.2, "stop_at_eos": True},
    {"cache": "prefix"},
    {"cache": "dual", "cfg_scale": 0.5, "threshold": 0.2, "temperature": 0.5},
]


def settings(batch_size: int) -> list[GenerationConfig]:
    common = {"gen_length": 8, "block_length": 4, "steps": 8, "batch_size": batch_size}
    return [GenerationConfig(**common, **changes) for changes in SETTINGS]


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    return run_ranks(generated, 1, settings(1))[0]


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "tensor", "pipeline"), [(4, 1, 1, 1), (3, 4, 2, 1), (2, 2, 1, 2), (4, 4, 2, 2)]
)
def test_responses_depend_neither_on_batch_nor_on_ranks(
    batch_size: int, num_ranks: int, tensor: int, pipeline: int, alone: list[list[list[int]]]
) -> None:
    for results in run_ranks(generated, num_ranks, settings(batch_size), tensor, pipeline):
        for changes, responses, expected in zip(SETTINGS, results, alone):
            assert responses == expected, changes
            assert all(len(response) == 8 and MASK not in response for response in responses)


def test_cache_of_an_empty_prompt() -> None:
    """It has no place before its first block."""
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=4, steps=8, cache="prefix")
    responses = denoise(engine, [[], [5, 6]], [0, 1], config, SPECIAL)
    assert [response.tokens for response in responses] == [list(range(2, 10)), list(range(4, 12))]


def test_every_remasking_rule_is_known() -> None:
    for name in REMASKING:
        GenerationConfig(gen_length=4, block_length=4, steps=4, remasking=name)
