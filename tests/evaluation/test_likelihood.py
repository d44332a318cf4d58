"""Likelihoods against enumeration of every mask, and against the chain rule."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.data.sft import Sample
from megatron_mdm.evaluation.likelihood import COUNTS, MASK_BOUND, LikelihoodConfig, stratified, systematic
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.objectives.autoregressive import NEXT_TOKENS
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, small_model

SPECIAL = SpecialIds(MASK, PAD, EOS)
CONFIG = LikelihoodConfig(num_times=4, num_repeats=24, batch_size=16)
CONFIGS = [CONFIG, CONFIG.model_copy(update={"cfg_scale": 1.5})]


def samples() -> list[Sample]:
    """Three, of 5, 3 and 1 eligible tokens."""
    generator = np.random.default_rng(0)
    return [
        Sample.of(generator.integers(2, MASK, prompt + response).astype(np.int32), prompt)
        for prompt, response in ((3, 5), (6, 3), (2, 1))
    ]


def built_engine(tensor: int, attention: str = "bidirectional"):
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(tensor=tensor))
    model = small_model(init_std=0.3, attention=attention)
    return InferenceEngine(build_model(model, ParallelConfig(tensor=tensor), context, 3), "fp32"), context


def log_probabilities(engine: Any, tokens: np.ndarray, selected: np.ndarray, causal: bool = False):
    import torch

    from megatron_mdm.batch import Full
    from megatron_mdm.engine.inputs import logits_inputs

    row = torch.from_numpy(tokens.astype(np.int64))[None]
    logits = engine.logits(logits_inputs(row, Full(causal=causal), torch.from_numpy(selected)[None]))
    return logits.double().log_softmax(1)


def enumerated_and_estimated() -> list[tuple[list[float], Any]]:
    from megatron_mdm.evaluation.likelihood import negative_log_likelihoods

    engine, context = built_engine(1)
    return [
        (
            [enumerated(engine, sample, config.cfg_scale) for sample in samples()],
            negative_log_likelihoods(engine, samples(), config, SPECIAL, context, MASK_BOUND),
        )
        for config in CONFIGS
    ]


def enumerated(engine: Any, sample: Sample, cfg_scale: float) -> float:
    """The bound over every mask."""
    places = np.flatnonzero(sample.eligible)
    by_count = []
    for count in range(1, len(places) + 1):
        losses = []
        for subset in combinations(places, count):
            masked = np.isin(np.arange(len(sample.tokens)), subset)
            noisy = np.where(masked, MASK, sample.tokens)
            scores = log_probabilities(engine, noisy, masked)
            if cfg_scale:  # LLaDA's get_logits
                blind = log_probabilities(engine, np.where(sample.eligible, noisy, MASK), masked)
                scores = (blind + (cfg_scale + 1) * (scores - blind)).log_softmax(1)
            losses.append(-float(scores[np.arange(count), sample.tokens[masked]].mean()))
        by_count.append(np.mean(losses))
    return len(places) * float(np.mean(by_count))


def two_repeats() -> tuple[Any, list[float]]:
    """(what is found of one sample from two repeats, the bound of each of them by its rows)"""
    from megatron_mdm.evaluation.likelihood import negative_log_likelihoods

    engine, context = built_engine(1)
    config = CONFIG.model_copy(update={"num_repeats": 2})
    one = samples()[:1]
    rows = MASK_BOUND.rows(one, config, SPECIAL)
    losses = []
    for row in (rows.make(index) for index in range(2 * config.num_times)):
        scores = log_probabilities(engine, row.tokens, row.scored)
        losses.append(-float(scores[np.arange(row.scored.sum()), row.labels[row.scored]].mean()))
    bounds = 5 * np.reshape(losses, (2, config.num_times)).mean(1)
    return negative_log_likelihoods(engine, one, config, SPECIAL, context, MASK_BOUND), bounds.tolist()


def estimated(tensor: int) -> Any:
    from megatron_mdm.evaluation.likelihood import negative_log_likelihoods

    engine, context = built_engine(tensor)
    return [negative_log_likelihoods(engine, samples(), config, SPECIAL, context, MASK_BOUND) for config in CONFIGS]


def test_bound_agrees_with_enumeration_within_its_standard_error() -> None:
    """With guidance and without."""
    results = run_ranks(enumerated_and_estimated, 1)[0]
    for exact, found in results:
        assert found.num_eligible.tolist() == [5, 3, 1]
        assert found.standard_error[2] == pytest.approx(0.0, abs=1e-6)  # one token: one mask
        assert found.nats[2] == pytest.approx(exact[2], rel=1e-5)
        for nats, error, expected in zip(found.nats, found.standard_error, exact):
            assert abs(nats - expected) <= 3.5 * error + 1e-5  # 24 repeats: 0.2 % of draws lie farther
        assert 0.0 < found.standard_error[0] < 0.1 * exact[0]
    for ranks, tensor in ((2, 1), (2, 2)):
        for layout in run_ranks(estimated, ranks, tensor):
            for again, (_, found) in zip(layout, results):
                np.testing.assert_allclose(again.nats, found.nats, rtol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("num_eligible", "num_times"), [(7, 3), (4, 16), (1, 2)])
def test_every_count_is_as_likely(name: str, num_eligible: int, num_times: int) -> None:
    draws = [COUNTS[name](num_eligible, num_times, np.random.default_rng(seed)) for seed in range(4000)]
    shares = np.bincount(np.concatenate(draws), minlength=num_eligible + 1)[1:] / (4000 * num_times)
    # The draws of one generator are negatively dependent: independence bounds the error from above.
    np.testing.assert_allclose(shares, 1 / num_eligible, atol=4 * (1 / num_eligible / 4000 / num_times) ** 0.5)


def test_counts_are_spread() -> None:
    generator = np.random.default_rng(1)
    assert sorted(systematic(8, 8, generator)) == list(range(1, 9))  # LLaDA's: each once
    assert sorted(stratified(8, 8, generator)) == list(range(1, 9))


def chain_rule() -> tuple[list[float], Any]:
    from megatron_mdm.evaluation.likelihood import negative_log_likelihoods

    engine, context = built_engine(1, "causal")
    exact = []
    for sample in samples():
        places = np.flatnonzero(sample.eligible)
        before = np.isin(np.arange(len(sample.tokens)), places - 1)
        scores = log_probabilities(engine, sample.tokens, before, causal=True)
        exact.append(-float(scores[np.arange(len(places)), sample.tokens[places]].sum()))
    return exact, negative_log_likelihoods(engine, samples(), CONFIG, SPECIAL, context, NEXT_TOKENS)


def test_autoregressive_likelihood_is_exact() -> None:
    exact, found = run_ranks(chain_rule, 1)[0]
    np.testing.assert_allclose(found.nats, exact, rtol=1e-5)
    assert found.standard_error.tolist() == [0.0, 0.0, 0.0]


def guided_causal_model() -> str:
    from megatron_mdm.config.errors import UserError
    from megatron_mdm.evaluation.likelihood import negative_log_likelihoods

    engine, context = built_engine(1, "causal")
    try:
        negative_log_likelihoods(engine, samples(), CONFIGS[1], SPECIAL, context, NEXT_TOKENS)
    except UserError as error:
        return str(error)
    return ""


def test_guidance_is_for_masked_models() -> None:
    assert "cfg_scale 1.5" in run_ranks(guided_causal_model, 1)[0]


def test_standard_error_of_two_repeats_is_half_their_difference() -> None:
    found, (first, second) = run_ranks(two_repeats, 1)[0]
    assert found.nats[0] == pytest.approx((first + second) / 2, rel=1e-5)
    assert found.standard_error[0] == pytest.approx(abs(first - second) / 2, rel=1e-4)
    assert abs(first - second) > 1e-2
