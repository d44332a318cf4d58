"""The loss of a noised micro-batch, as weights on token cross-entropies.

Per sample:                         l = (1/P) Σ_i 1[i masked] · v_i · CE_i,  v = 1/q (paper, Eq. 1), or 1
Per global batch of n samples:      (1/n) Σ w · share · l,  w = 1/p(t), l the mean over views, share by normalisation

whatever the micro-batches' sizes. Which published training code each normalisation equals: README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.batch import LossWeights
from megatron_mdm.config.sections.diffusion import BY_MASKED_TOKENS
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.noiser import NoisedBatch

_Counts = TypeVar("_Counts", Tensor, Floats)


class GlobalBatch(NamedTuple):
    """What a normalisation must know of the whole global batch; of an average one, the numbers need not be whole."""

    num_samples: float
    num_eligible: float  # Σ P
    # Σ w M, M a sample's masked positions in the mean over its views; not a number where nothing depends on it
    num_masked: float = float("nan")


class Share(Protocol):
    """P [K] of samples → what their means over P tokens count for in the batch's mean, [K]."""

    def __call__(self, count: _Counts, batch: GlobalBatch, /) -> _Counts: ...


def _of_sample(count: _Counts, _: GlobalBatch) -> _Counts:
    """Every sample weighs the same."""
    return count * 0.0 + 1.0


def _of_token(count: _Counts, batch: GlobalBatch) -> _Counts:
    """Every eligible token weighs the same: the sum over the batch divided by its Σ P."""
    return count * (batch.num_samples / batch.num_eligible)


def _of_batch(count: _Counts, _: GlobalBatch) -> _Counts:
    """Samples' sums, not divided by P; their mean over the batch."""
    return count


def _of_masked(count: _Counts, batch: GlobalBatch) -> _Counts:
    """The sum over the batch divided by its Σ w M: for uniform t, the mean over all masked tokens."""
    return count * (batch.num_samples / (batch.num_masked or 1.0))  # where nothing is masked, the sum is 0


@dataclass(frozen=True)
class Normalization:
    """How token cross-entropies add up to the batch's loss."""

    is_inverse_to_rate: bool  # v = 1/q; else 1
    share: Share
    counts_masked: bool = False  # whether it reads num_masked

    def __call__(self, noised: NoisedBatch, batch: GlobalBatch) -> LossWeights:
        count = noised.clean.num_eligible.float().repeat(noised.views)
        token = noised.token_weight if self.is_inverse_to_rate else noised.masked.float()
        per_sample = (noised.sample_weight / (noised.views * batch.num_samples)).to(torch.float32)
        row = per_sample.repeat(noised.views) * self.share(count, batch)
        return LossWeights(token / count[:, None], row)

    def token_weight(self, q: Floats, count: Floats, batch: GlobalBatch) -> Floats:
        """Weight of a masked token in its sample's estimate, share · v / P: q its mask probability [..., K], P [K]."""
        return (1.0 / q if self.is_inverse_to_rate else np.ones_like(q)) / count * self.share(count, batch)


NORMALIZATIONS: dict[str, Normalization] = {
    "sample": Normalization(True, _of_sample),
    "token": Normalization(True, _of_token),
    "batch": Normalization(True, _of_batch),
    BY_MASKED_TOKENS: Normalization(True, _of_masked, counts_masked=True),
    "unweighted": Normalization(False, _of_sample),
    "unweighted_token": Normalization(False, _of_token),
    "unweighted_batch": Normalization(False, _of_batch),
    "unweighted_masked": Normalization(False, _of_masked, counts_masked=True),
}


def weighted_masked(noised: NoisedBatch) -> Tensor:
    """w M of each sample [B] float64: its importance weight times its masked positions, in the mean over its views."""
    return noised.sample_weight * noised.masked.sum(1).double().view(noised.views, -1).mean(0)
