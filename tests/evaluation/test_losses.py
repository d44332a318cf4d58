"""What moments of losses are made of: a row's sums carry its share of the batch."""

from __future__ import annotations

import numpy as np
import torch

from megatron_mdm.batch import CleanBatch, RowStatistics
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch
from megatron_mdm.diffusion.t_samplers import UniformSampler
from megatron_mdm.evaluation.losses import row_sums
from tests.diffusion.toy import design

LENGTHS = (7, 3)
WIDTH = max(LENGTHS)


def two_samples() -> CleanBatch:
    lengths = torch.tensor(LENGTHS)
    inside = torch.arange(WIDTH)[None] < lengths[:, None]
    return CleanBatch(
        tokens=torch.full((2, WIDTH), 5),
        eligible=inside,
        delimiters=torch.zeros(2, WIDTH, dtype=torch.bool),
        lengths=lengths,
        positions=torch.arange(2),
        sample_ids=torch.arange(2),
    )


def test_sums_of_a_row_carry_its_share_of_the_batch() -> None:
    """Weighed by tokens, the longer sample counts 7/5, the shorter 3/5: sums by that, sums of squares by its square."""
    make = Noiser(
        design=design(complementary=True), sampler=UniformSampler(), num_strata=2, global_size=2, mask_id=9, seed=3
    )
    noised = make(two_samples(), 0)
    batch = GlobalBatch(2, sum(LENGTHS))
    weights = NORMALIZATIONS["token"](noised, batch)
    generator = torch.Generator().manual_seed(0)
    cross_entropy = torch.rand(4, WIDTH, generator=generator)
    gradient = torch.rand(4, WIDTH, generator=generator)
    terms = weights.token * cross_entropy
    rows = RowStatistics(terms.sum(1), terms.square().sum(1), (weights.token * gradient).square().sum(1))
    sums = row_sums(noised, weights, batch, rows)

    share = np.array(LENGTHS)[:, None] / 5.0  # of a sample, against the mean of the two
    mean = noised.token_weight.numpy().reshape(2, 2, WIDTH).transpose(1, 0, 2) / np.array(LENGTHS)[:, None, None]
    own = mean * share[:, :, None]  # [B, V, S]: a token's weight in the sample's estimate
    by_sample = cross_entropy.numpy().reshape(2, 2, WIDTH).transpose(1, 0, 2)
    slopes = gradient.numpy().reshape(2, 2, WIDTH).transpose(1, 0, 2)
    expected = ((own * by_sample).sum(2), ((own * by_sample) ** 2).sum(2), ((own * slopes) ** 2).sum(2))
    for found, value in zip(sums, (*expected, own.sum(2), (own**2).sum(2)), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5)
