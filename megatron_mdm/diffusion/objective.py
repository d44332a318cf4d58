"""The loss of a noised micro-batch, as weights on token cross-entropies.

Per sample (paper, Eq. 1):  l = (1/P) Σ_i 1[i masked] · CE_i · w_i,  w = 1/q.
Per global batch of n samples:  mean of (1/p(t)) · mean over views of l, whatever the micro-batches' sizes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.noiser import NoisedBatch


class LossWeights(NamedTuple):
    token: Tensor  # [V·B, S] float32: a row's loss is Σ_i token_i · CE_i
    row: Tensor  # [V·B] float32: the global batch's loss is Σ over all its rows of row · (row's loss)


class GlobalBatch(NamedTuple):
    """What a normalisation must know of the whole global batch."""

    num_samples: int
    num_eligible: int  # Σ P


class Normalization(Protocol):
    """How token cross-entropies add up to the batch's loss."""

    def __call__(self, noised: NoisedBatch, batch: GlobalBatch) -> LossWeights: ...

    def token_weight(self, q: Floats, count: Floats, mean_count: float) -> Floats:
        """Weight of a masked token in its sample's loss: q its mask probability [..., K], count P [K] and its mean."""
        ...


class PerSample:
    """Every sample weighs the same (the paper's loss)."""

    def __call__(self, noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
        return LossWeights(noised.token_weight / _eligible_per_row(noised)[:, None], _mean_over_batch(noised, batch))

    def token_weight(self, q: Floats, count: Floats, mean_count: float) -> Floats:
        return 1.0 / (q * count)


class PerToken:
    """Every eligible token weighs the same: Σ_samples Σ_i CE_i/q divided by the global batch's Σ P."""

    def __call__(self, noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
        weights = PerSample()(noised, batch)
        share = _eligible_per_row(noised) * (batch.num_samples / batch.num_eligible)
        return LossWeights(weights.token, weights.row * share)

    def token_weight(self, q: Floats, count: Floats, mean_count: float) -> Floats:
        return 1.0 / (q * mean_count) + np.zeros_like(count)


class Unweighted:
    """No 1/q (MMaDA's text-to-image loss): l = (1/P) Σ_i 1[i masked] CE_i."""

    def __call__(self, noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
        count = _eligible_per_row(noised)
        return LossWeights(noised.masked.float() / count[:, None], _mean_over_batch(noised, batch))

    def token_weight(self, q: Floats, count: Floats, mean_count: float) -> Floats:
        return 1.0 / count + np.zeros_like(q)


NORMALIZATIONS: dict[str, Normalization] = {
    "sample": PerSample(),
    "token": PerToken(),
    "unweighted": Unweighted(),
}


def _eligible_per_row(noised: NoisedBatch) -> Tensor:
    return noised.clean.num_eligible.float().repeat(noised.views)


def _mean_over_batch(noised: NoisedBatch, batch: GlobalBatch) -> Tensor:
    per_sample = noised.sample_weight / (noised.views * batch.num_samples)
    return per_sample.to(torch.float32).repeat(noised.views)
