"""Loss weights: what each normalisation adds up to, as in published code, whatever the micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from megatron_mdm.batch import CleanBatch
from megatron_mdm.config.schema import DiffusionConfig
from megatron_mdm.diffusion.exposure import SampleShapes, average_batch
from megatron_mdm.diffusion.mask_schedule import CosineSchedule, Floats, LinearSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.noiser import NoisedBatch, noise
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch, weighted_masked
from tests.diffusion.toy import draw

DESIGN = MaskDesign(MASKING_RULES["bernoulli"], LinearSchedule(1e-3), complementary=True)
# eligible tokens, and those before them
LENGTHS = [3, 7, 5, 8]
PROMPT = 2
WEIGHTS = np.array([1.3, 0.8, 1.0, 0.5])


def noised(rows: list[int], design: MaskDesign = DESIGN, weights: Floats = WEIGHTS) -> NoisedBatch:
    lengths = torch.tensor([PROMPT + LENGTHS[row] for row in rows])
    size = int(lengths.max())
    places = torch.arange(size)[None, :]
    eligible = (places >= PROMPT) & (places < lengths[:, None])
    tokens = torch.full((len(rows), size), 5)
    nothing = torch.zeros_like(eligible)
    batch = CleanBatch(tokens, eligible, nothing, lengths, torch.tensor(rows), torch.tensor(rows))
    t = np.array([0.2, 0.5, 0.7, 0.9])[rows]
    generators = [np.random.default_rng(row) for row in rows]
    return noise(batch, t, weights[rows], generators, design=design, mask_id=9)


def batch_of(whole: NoisedBatch) -> GlobalBatch:
    return GlobalBatch(len(LENGTHS), sum(LENGTHS), float(weighted_masked(whole).sum()))


BATCH = batch_of(noised([0, 1, 2, 3]))


def total(batch: NoisedBatch, normalization: str) -> float:
    """The micro-batch's share of the loss if every cross-entropy were 1."""
    weights = NORMALIZATIONS[normalization](batch, BATCH)
    return float((weights.row[:, None] * weights.token * batch.masked).sum())


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_loss_does_not_depend_on_the_cut_into_micro_batches(name: str) -> None:
    whole = total(noised([0, 1, 2, 3]), name)
    parts = total(noised([3]), name) + total(noised([1, 0, 2]), name)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_every_normalisation_can_be_configured() -> None:
    assert set(get_args(DiffusionConfig.model_fields["normalization"].annotation)) == set(NORMALIZATIONS)


def test_normalisations_by_hand() -> None:
    batch = noised([0, 1, 2, 3])
    q = (1 - 1e-3) * batch.t.numpy() + 1e-3
    masked = batch.masked.view(2, 4, -1).sum(2).numpy()  # [V, B]
    weight = batch.sample_weight.numpy()
    count = np.array(LENGTHS)
    weighted_count = (weight * masked).sum() / 2
    expected = {
        "sample": (weight * masked / (count * q)).sum() / 8,
        "token": (weight * masked / q).sum() / 2 / sum(LENGTHS),
        "batch": (weight * masked / q).sum() / 8,
        "masked": (weight * masked / q).sum() / 2 / weighted_count,
        "unweighted": (weight * masked / count).sum() / 8,
        "unweighted_token": (weight * masked).sum() / 2 / sum(LENGTHS),
        "unweighted_batch": (weight * masked).sum() / 8,
        "unweighted_masked": 1.0,
    }
    assert {name: pytest.approx(total(batch, name), rel=1e-6) for name in NORMALIZATIONS} == expected


# Published training code, each written from its own formula: [B, S] cross-entropies, masks and eligible positions, and
# [B, 1] mask probabilities. With one device and one micro-batch, theirs are of the global batch, as ours always are.
PEERS: dict[str, Callable[[Floats, Floats, Floats, Floats], float]] = {
    # LLaDA's GUIDELINES.md, fine-tuning; MMaDA's losses of text with answer lengths; LLaDA-V; dllm sequence + scheduler
    "sample": lambda ce, m, e, q: (ce * m / q / e.sum(1, keepdims=True)).sum() / len(ce),
    # MDLM; d1; LLaDA's pre-training; dllm token + scheduler
    "token": lambda ce, m, e, q: (ce * m / q).sum() / e.sum(),
    "batch": lambda ce, m, e, q: (ce * m / q).sum() / len(ce),  # dllm batch + scheduler
    "masked": lambda ce, m, e, q: (ce * m / q).sum() / m.sum(),  # Dream
    "unweighted": lambda ce, m, e, q: (ce * m / e.sum(1, keepdims=True)).sum() / len(ce),  # dllm sequence + uniform
    "unweighted_token": lambda ce, m, e, q: (ce * m).sum() / e.sum(),  # dllm token + uniform
    "unweighted_batch": lambda ce, m, e, q: (ce * m).sum() / len(ce),  # dllm batch + uniform
    "unweighted_masked": lambda ce, m, e, q: ce[m > 0].mean(),  # MMaDA's loss of images: cross_entropy's own mean
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalisations_are_those_of_published_code(name: str) -> None:
    single = noised([0, 1, 2, 3], MaskDesign(DESIGN.rule, DESIGN.schedule), np.ones(4))
    entropies = np.random.default_rng(0).exponential(2.0, single.masked.shape)
    masked = single.masked.numpy().astype(float)
    eligible = single.clean.eligible.numpy().astype(float)
    q = DESIGN.schedule.mask_probability(single.t.numpy())[:, None]
    weights = NORMALIZATIONS[name](single, batch_of(single))
    rows = (weights.token.double().numpy() * entropies).sum(1)
    assert weights.row.double().numpy() @ rows == pytest.approx(PEERS[name](entropies, masked, eligible, q), rel=1e-6)


def test_rounded_counts_mean_over_masked_tokens_is_mmadas() -> None:
    """MMaDA's loss of images: the mean over all masked tokens of the micro-batch, which is ours where that is the whole
    batch; where it is one image (its later stages), (1/M) Σ CE of each, which `sample` is."""
    design = MaskDesign(MASKING_RULES["rounded_count"], CosineSchedule(1e-3))
    single = noised([0, 1, 2, 3], design, np.ones(4))
    entropies = np.random.default_rng(0).exponential(2.0, single.masked.shape)
    masked = single.masked.numpy()
    of_all = NORMALIZATIONS["unweighted_masked"](single, batch_of(single))
    found = of_all.row.double().numpy() @ (of_all.token.double().numpy() * entropies).sum(1)
    assert found == pytest.approx(entropies[masked].mean(), rel=1e-6)
    of_each = NORMALIZATIONS["sample"](single, batch_of(single))
    found = of_each.row.double().numpy() @ (of_each.token.double().numpy() * entropies).sum(1)
    assert found == pytest.approx(np.mean([e[m].mean() for e, m in zip(entropies, masked)]), rel=1e-6)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_calibration_weighs_tokens_as_training_does(name: str) -> None:
    """A sample's estimate is n times its part of the batch's loss; its tokens' weights are what calibration expects."""
    batch = noised([0, 1, 2, 3])
    q = DESIGN.schedule.mask_probability(np.array([0.2, 0.5, 0.7, 0.9]))
    weights = NORMALIZATIONS[name](batch, BATCH)
    per_sample = weights.row[:, None] * weights.token * (batch.views * 4) / batch.sample_weight.repeat(2)[:, None]
    expected = NORMALIZATIONS[name].token_weight(q, np.array(LENGTHS, dtype=float), BATCH)
    for row in range(8):
        found = per_sample[row][batch.masked[row]]
        np.testing.assert_allclose(found, np.full(len(found), expected[row % 4]), rtol=1e-6)


def test_a_batch_without_a_mask_has_no_loss() -> None:
    batch = noised([0, 1])
    nothing = torch.zeros_like(batch.masked)
    batch = replace(batch, masked=nothing, token_weight=nothing.float())
    for name in NORMALIZATIONS:
        weights = NORMALIZATIONS[name](batch, GlobalBatch(2, 10, float(weighted_masked(batch).sum())))
        assert torch.isfinite(weights.row).all(), name
        assert not weights.token.any(), name


@pytest.mark.parametrize("rule", MASKING_RULES)
def test_an_average_batch_has_the_masks_that_uniform_t_draws(rule: str) -> None:
    """With two delimiters in one of the samples, under ISAD."""
    design = MaskDesign(MASKING_RULES[rule], LinearSchedule(0.1), delimiter_shift=0.2)
    counts = np.array([4, 4, 9])
    delimiters = np.array([0, 2, 2])
    typical = average_batch(design, SampleShapes.of(counts, delimiters))
    assert typical.num_eligible == pytest.approx(17 / 3)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(3000):
        which = generator.integers(3)
        marks = np.arange(counts[which]) < delimiters[which]
        drawn.append(draw(design, generator, generator.random(), marks).masked.sum())
    assert abs(typical.num_masked - np.mean(drawn)) < 4 * np.std(drawn) / np.sqrt(len(drawn))
