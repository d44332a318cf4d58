"""The loss of a noised micro-batch, as weights on token cross-entropies.

Per sample (paper, Eq. 1):  l = (1/P) Σ_i 1[i masked] · CE_i · w_i,  w = 1/q.
Per global batch of n samples:  mean of (1/p(t)) · mean over views of l, whatever the micro-batches' sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.diffusion.noiser import NoisedBatch


class LossWeights(NamedTuple):
    token: Tensor  # [V·B, S] float32: a row's loss is Σ_i token_i · CE_i
    row: Tensor  # [V·B] float32: the global batch's loss is Σ over all its rows of row · (row's loss)


class GlobalBatch(NamedTuple):
    """What a normalisation must know of the whole global batch."""

    num_samples: int
    num_eligible: int  # Σ P


def _per_sample(noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
    """Every sample weighs the same (the paper's loss)."""
    count = _eligible_per_row(noised)
    return LossWeights(noised.token_weight / count[:, None], _mean_over_batch(noised, batch))


def _per_token(noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
    """Every eligible token weighs the same: Σ_samples Σ_i CE_i/q divided by the global batch's Σ P."""
    weights = _per_sample(noised, batch)
    share = _eligible_per_row(noised) * (batch.num_samples / batch.num_eligible)
    return LossWeights(weights.token, weights.row * share)


def _unweighted(noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
    """No 1/q (MMaDA's text-to-image loss): l = (1/P) Σ_i 1[i masked] CE_i."""
    count = _eligible_per_row(noised)
    return LossWeights(noised.masked.float() / count[:, None], _mean_over_batch(noised, batch))


NORMALIZATIONS: dict[str, Callable[[NoisedBatch, GlobalBatch], LossWeights]] = {
    "sample": _per_sample,
    "token": _per_token,
    "unweighted": _unweighted,
}


def _eligible_per_row(noised: NoisedBatch) -> Tensor:
    return noised.clean.num_eligible.float().repeat(noised.views)


def _mean_over_batch(noised: NoisedBatch, batch: GlobalBatch) -> Tensor:
    per_sample = noised.sample_weight / (noised.views * batch.num_samples)
    return per_sample.to(torch.float32).repeat(noised.views)
