"""Loss weights: what each normalisation adds up to, and independence from the micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mdm.diffusion.mask_schedule import MaskSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.noiser import CleanBatch, NoisedBatch, noise
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch

DESIGN = MaskDesign(MASKING_RULES["bernoulli"], MaskSchedule(1e-3), complementary=True)
LENGTHS = [3, 7, 5, 8]
BATCH = GlobalBatch(num_samples=4, num_eligible=sum(LENGTHS))


def noised(rows: list[int]) -> NoisedBatch:
    size = max(LENGTHS[row] for row in rows)
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    eligible = torch.arange(size)[None, :] < lengths[:, None]
    tokens, nothing = torch.full((len(rows), size), 5), torch.zeros_like(eligible)
    batch = CleanBatch(tokens, eligible, nothing, lengths, torch.tensor(rows), torch.tensor(rows))
    t = np.array([0.2, 0.5, 0.7, 0.9])[rows]
    weight = np.array([1.3, 0.8, 1.0, 0.5])[rows]
    generators = [np.random.default_rng(row) for row in rows]
    return noise(batch, t, weight, generators, design=DESIGN, mask_id=9)


def total(batch: NoisedBatch, normalization: str) -> float:
    """The micro-batch's share of the loss if every cross-entropy were 1."""
    weights = NORMALIZATIONS[normalization](batch, BATCH)
    return float((weights.row[:, None] * weights.token * batch.masked).sum())


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_loss_does_not_depend_on_the_cut_into_micro_batches(name: str) -> None:
    whole = total(noised([0, 1, 2, 3]), name)
    parts = total(noised([3]), name) + total(noised([1, 0, 2]), name)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_normalisations_by_hand() -> None:
    batch = noised([0, 1, 2, 3])
    q = (1 - 1e-3) * batch.t.numpy() + 1e-3
    masked = batch.masked.view(2, 4, -1).sum(2).numpy()  # [V, B]
    weight, count = batch.sample_weight.numpy(), np.array(LENGTHS)
    assert total(batch, "sample") == pytest.approx((weight * masked / (count * q)).sum() / 8, rel=1e-6)
    assert total(batch, "unweighted") == pytest.approx((weight * masked / count).sum() / 8, rel=1e-6)
    assert total(batch, "token") == pytest.approx((weight * masked / q).sum() / 2 / sum(LENGTHS), rel=1e-6)
