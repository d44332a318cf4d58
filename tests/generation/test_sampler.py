"""Denoising: counts, blocks, independence from the batch and from the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.batch import ModelInputs
from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.generation.candidates import draw, truncated
from megatron_mdm.generation.remask import (
    COMMIT_SCHEDULES,
    REMASKING,
    Ranking,
    Step,
    confident_enough,
    cosine,
    epsilon,
    linear,
)
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig, Response, SpecialIds
from megatron_mdm.models.cache import Window
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, VOCAB, small_model

SPECIAL = SpecialIds(MASK, PAD, EOS)
SPECIAL_OF_TWO_ENDS = SpecialIds(MASK, PAD, EOS, frozenset({8}))
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


class Recorder:
    """An engine whose logits favour token position + 2, most strongly at later positions; keeps what it saw."""

    def __init__(self) -> None:
        self.inputs: list[ModelInputs] = []

    def logits(self, inputs: ModelInputs, window: Window | None = None) -> torch.Tensor:
        self.inputs.append(inputs._replace(tokens=inputs.tokens.clone()))
        places = torch.arange(inputs.tokens.shape[1]).expand_as(inputs.tokens) if window is None else window.positions
        position = places[inputs.selected]
        logits = torch.zeros(len(position), VOCAB)
        return logits.scatter_(1, (2 + position)[:, None], 1.0 + position[:, None].float())


def test_blocks_are_finished_left_to_right_and_the_most_confident_first() -> None:
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=4, steps=4)
    responses = denoise(engine, PROMPTS[:2], [0, 1], config, SPECIAL)
    starts = [3, 2]
    assert [response.tokens for response in responses] == [[2 + start + i for i in range(8)] for start in starts]
    masked = [inputs.selected.sum(1).tolist() for inputs in engine.inputs]
    assert masked == [[4, 4], [2, 2], [4, 4], [2, 2]]
    second = engine.inputs[1].tokens[0, 3:7] == MASK  # the later, more confident positions were committed first
    assert second.tolist() == [True, True, False, False]
    assert (engine.inputs[1].tokens[0, 7:11] == MASK).all()


@pytest.mark.parametrize(("masked", "steps"), [(32, 32), (8, 3), (4, 8), (7, 7)])
def test_tokens_per_step(masked: int, steps: int) -> None:
    counts = [step.count for step in linear(masked, steps, 0.0)]
    assert sum(counts) == masked
    assert len(counts) == steps
    assert sorted(counts, reverse=True) == counts
    assert max(counts) - min(counts) <= 1


def test_gumbel_rule_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])  # the last is the mask's
    uniforms = torch.from_numpy(np.random.default_rng(0).random((40_000, 4)))
    tokens = draw(logits.expand(40_000, 4), 0.5, 1.0, 0, 3, uniforms.__getitem__).tokens
    torch.testing.assert_close(tokens.bincount(minlength=3) / 40_000, (2 * logits[:3]).softmax(0), atol=0.01, rtol=0.0)
    assert draw(logits[None], 0.0, 1.0, 0, 3, torch.empty(0).__getitem__).tokens == 2


def test_nucleus_and_the_most_likely_tokens() -> None:
    """The fewest tokens that hold more than top_p: .5, then .5 + .3; ties of top_k are all kept."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for top_p, top_k, kept in (
        (0.45, 0, [1]),
        (0.6, 0, [1, 3]),
        (0.81, 0, [0, 1, 3]),
        (1.0, 2, [1, 3]),
        (0.6, 3, [1, 3]),
        (0.9, 1, [1]),
        (1.0, 9, [0, 1, 2, 3]),
    ):
        assert truncated(logits, top_p, top_k)[0].isfinite().nonzero()[:, 0].tolist() == kept
        assert torch.equal(truncated(logits, top_p, top_k)[0, kept], logits[0, kept])
    assert truncated(torch.zeros(1, 3), 1.0, 2).isfinite().all()


def test_where_only_the_mask_is_kept_the_next_best_is_the_candidate() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0], [3.0, 2.0, 1.0]])
    for temperature, uniforms in ((0.0, torch.empty(0)), (0.5, torch.full((2, 3), 0.5))):
        found = draw(logits, temperature, 1.0, 1, 2, uniforms.__getitem__)
        assert found.tokens.tolist() == [1, 0]
        scores = REMASKING["maskgit_plus"].confidence(found, torch.empty(0))
        assert scores.tolist() == [0.0, 1.0]  # of no probability, so the last to be committed


@pytest.mark.parametrize("name", COMMIT_SCHEDULES)
@pytest.mark.parametrize(("masked", "steps"), [(32, 32), (8, 3), (4, 8), (1, 1)])
def test_every_schedule_commits_all(name: str, masked: int, steps: int) -> None:
    plan = COMMIT_SCHEDULES[name](masked, steps, 1e-3)
    assert (sum(step.count for step in plan), len(plan)) == (masked, steps)
    left = masked
    for step in plan:
        if name == "epsilon":
            assert step.count <= step.share * left + 1e-6  # cut off
        else:
            assert step == Step(step.count, step.count / left if left else 0.0)
            assert step.count >= 1 or steps > masked
        left -= step.count


def test_cosine_schedule() -> None:
    """⌊16 · cos(π/8 · s)⌋ = 14, 11, 6, 0 stay masked."""
    assert [step.count for step in cosine(16, 4, 0.0)] == [2, 3, 5, 6]


def test_dreams_schedule() -> None:
    """t = 1, .7525, .505, .2575, .01: the shares .2475, .329, .490 of 8, 7 and 5, then what is left."""
    plan = epsilon(8, 4, 0.01)
    assert [step.count for step in plan] == [1, 2, 2, 3]
    assert [step.share for step in plan] == pytest.approx([0.2475, 1 - 505 / 752.5, 1 - 257.5 / 505, 1.0])


def generated(configs: list[GenerationConfig], tensor: int = 1, pipeline: int = 1) -> list[list[Response]]:
    """The responses to all prompts by setting."""
    from megatron_mdm.generation.generate import generate

    engine, context = built_engine(tensor, pipeline)
    return [generate(engine, PROMPTS, config, SPECIAL, context) for config in configs]


def built_engine(tensor: int, pipeline: int):
    from megatron_mdm.engine.inference import InferenceEngine, PipelinedInferenceEngine, build_stage
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    context = initialize(parallel)
    model = small_model(init_std=0.3, num_layers=3)
    if pipeline > 1:
        stages = build_stage(model, parallel, context, 3, 16)
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
    {"remasking": "entropy", "schedule": "epsilon", "cfg_scale": 1.0, "top_p": 0.7, "alg_temp": 0.2},
    {"remasking": "topk_margin", "schedule": "cosine", "steps": 4, "temperature": 0.8, "top_k": 5, "eos": "last"},
    {"remasking": "origin", "schedule": "epsilon", "temperature": 1.0, "top_p": 0.9, "cache": "prefix"},
    {"remasking": "maskgit_plus", "threshold": 0.2, "temperature": 0.3, "stop_at_eos": True},
    {"temperature": 1.0, "noise": "device"},
    {"remasking": "origin", "schedule": "epsilon", "temperature": 0.7, "noise": "device", "cache": "prefix"},
    {"remasking": "entropy", "temperature": 0.7, "alg_temp": 0.2, "noise": "device", "steps": 4},
]


def settings(batch_size: int) -> list[GenerationConfig]:
    common = {"gen_length": 8, "block_length": 4, "steps": 8, "batch_size": batch_size}
    return [GenerationConfig(**{**common, **changes}) for changes in SETTINGS]


@pytest.fixture(scope="module")
def alone() -> list[list[Response]]:
    return run_ranks(generated, 1, settings(1))[0]


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "tensor", "pipeline"), [(4, 1, 1, 1), (3, 4, 2, 1), (2, 2, 1, 2), (4, 4, 2, 2)]
)
def test_responses_depend_neither_on_batch_nor_on_ranks(
    batch_size: int, num_ranks: int, tensor: int, pipeline: int, alone: list[list[Response]]
) -> None:
    for results in run_ranks(generated, num_ranks, settings(batch_size), tensor, pipeline):
        for changes, responses, expected in zip(SETTINGS, results, alone):
            assert responses == expected, changes
            assert all(len(response.tokens) == 8 and MASK not in response.tokens for response in responses)


def test_a_threshold_is_met_by_what_equals_it() -> None:
    masked = torch.tensor([[True, True, True, False]])
    scores = torch.tensor([[0.5, 0.9, 0.8, float("-inf")]], dtype=torch.float64)
    ranking = Ranking(scores, masked, torch.zeros_like(masked))
    for threshold, chosen in ((0.95, [1]), (0.8, [1, 2]), (0.9, [1]), (0.5, [0, 1, 2])):
        assert confident_enough(ranking, 1, threshold)[0].nonzero()[:, 0].tolist() == chosen


def test_special_ids_without_an_eos() -> None:
    assert SpecialIds(MASK, PAD).end_ids == []
    assert SPECIAL_OF_TWO_ENDS.end_ids == [EOS, 8]


def test_steps_that_commit_nothing_cost_no_pass() -> None:
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=8, steps=20, schedule="epsilon", remasking="entropy")
    (response,) = denoise(engine, PROMPTS[:1], [0], config, SPECIAL)
    busy = [step for step in epsilon(8, 20, 1e-3) if step.count]
    assert len(engine.inputs) == response.steps == len(busy) < 20


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "entropy"])
def test_ends_are_committed_last(remasking: str) -> None:
    """Tokens 8 and 10 are ends. Every other of the block comes before them, whatever the order."""
    special = SPECIAL_OF_TWO_ENDS._replace(eos=10)
    config = GenerationConfig(gen_length=8, block_length=8, steps=8, remasking=remasking, eos="last")
    shown: list[list[int]] = []
    denoise(Recorder(), [[5, 6, 7]], [0], config, special, lambda responses: shown.append(responses[0].tolist()))
    for step, response in enumerate(shown):
        assert sum(token in (8, 10) for token in response) == max(0, step - 5)


@pytest.mark.parametrize(("special", "num_passes"), [(SpecialIds(MASK, PAD, EOS), 8), (SPECIAL_OF_TWO_ENDS, 4)])
def test_blocks_behind_any_end_token_are_left_out(special: SpecialIds, num_passes: int) -> None:
    """Token 8, an end of turn, is in the first block; the text up to it is the same."""
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=4, steps=8, stop_at_eos=True)
    (response,) = denoise(engine, [[5, 6, 7]], [0], config, special)
    assert len(engine.inputs) == num_passes
    assert response.tokens[:4] == [5, 6, 7, 8]
    assert response.tokens[4:] == ([9, 10, 11, 12] if num_passes == 8 else [EOS] * 4)


@pytest.mark.parametrize(
    ("cache", "computed"),
    [
        ("none", [11] * 8),  # the longer row, whole
        ("prefix", [11, 9, 9, 9, 11, 5, 5, 5]),  # the place before the block and all behind it
        ("dual", [11, 5, 5, 5, 11, 5, 5, 5]),  # the place before the block and the block
    ],
)
def test_what_a_cache_leaves_out(cache: Any, computed: list[int]) -> None:
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=4, steps=8, cache=cache)
    denoise(engine, PROMPTS[:2], [0, 1], config, SPECIAL)
    assert [inputs.tokens.shape[1] for inputs in engine.inputs] == computed


def test_cache_of_an_empty_prompt() -> None:
    """It has no place before its first block."""
    engine = Recorder()
    config = GenerationConfig(gen_length=8, block_length=4, steps=8, cache="prefix")
    responses = denoise(engine, [[], [5, 6]], [0, 1], config, SPECIAL)
    assert [response.tokens for response in responses] == [list(range(2, 10)), list(range(4, 12))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remasking": "confidence"}, "remasking must be one of low_confidence, random, maskgit_plus"),
        ({"schedule": "even"}, "schedule must be one of linear, cosine, epsilon"),
        ({"remasking": "entropy", "threshold": 0.9}, "needs remasking low_confidence or maskgit_plus"),
        ({"remasking": "random", "alg_temp": 0.1}, "remasking random has none"),
        ({"threshold": 0.9, "alg_temp": 0.1}, "threshold takes the most confident"),
        ({"remasking": "origin", "eos": "last"}, "remasking origin has none"),
        ({"block_length": 3}, "gen_length 4 must be a multiple of block_length 3"),
        ({"block_length": 2, "steps": 3}, "steps 3 must be a multiple of the 2 blocks"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**{"gen_length": 4, "block_length": 4, "steps": 4, **changes})


def layers_of_a_stage() -> list[str]:
    """On a pipeline rank: the names of the layers that it holds of a model whose head costs more than its blocks."""
    from megatron_mdm.engine.inference import build_stage
    from megatron_mdm.parallel.groups import initialize

    parallel = ParallelConfig(pipeline=2)
    model = small_model(num_layers=6, vocab_size=4096)
    return list(build_stage(model, parallel, initialize(parallel), 3, 16))


def test_stages_are_balanced_by_cost() -> None:
    first, last = run_ranks(layers_of_a_stage, 2)
    assert first + last == [str(number) for number in range(8)]
    assert last == ["7"]  # the head alone; by number of layers it would have three blocks, too
