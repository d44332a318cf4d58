"""The autoregressive baseline: next tokens in place of masked ones, no noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.batch import CleanBatch
from megatron_mdm.diffusion.mask_schedule import Floats, MaskSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.noiser import NoisedBatch


class NextTokens:
    """Stands where a Noiser does. Nothing is drawn: t has no meaning and is 1, as are all weights; so the variance that
    training logs is the data's (C of the decomposition)."""

    views = 1
    design = MaskDesign(MASKING_RULES["bernoulli"], MaskSchedule(1e-3))  # at t = 1, it masks what it predicts: q = 1

    def __init__(self, global_size: int) -> None:
        self.global_size = global_size

    def times(self, step: int) -> tuple[Floats, Floats]:
        """t and importance weight, all ones [n]."""
        return np.ones(self.global_size), np.ones(self.global_size)

    def __call__(self, batch: CleanBatch, step: int) -> NoisedBatch:
        return next_tokens(batch)


def next_tokens(batch: CleanBatch) -> NoisedBatch:
    """Every position whose next token is eligible is scored against that token: l = (1/P) Σ_i CE_{i→i+1}.

    In the result, clean holds what stands behind each position: P counts the tokens that are learnt. The first token of
    a sample, and of each of its segments, follows none and is left out.
    """
    eligible = _shifted(batch.eligible)
    if batch.segments is not None:  # the last token of a segment does not predict the next one's first
        eligible = eligible.scatter(1, batch.segments.cumsum(1) - 1, False)
    targets = replace(
        batch,
        tokens=_shifted(batch.tokens),
        eligible=eligible,
        delimiters=_shifted(batch.delimiters),
    )
    ones = torch.ones(len(batch.tokens), dtype=torch.float64)
    return NoisedBatch(
        clean=targets,
        noisy=batch.tokens,
        masked=targets.eligible,
        token_weight=targets.eligible.float(),
        sample_weight=ones,
        t=ones,
        views=1,
        pattern=batch.pattern(causal=True),
    )


def _shifted(tensor: Tensor) -> Tensor:
    """[B, S] with each position holding its successor's entry; the last one, zero."""
    return torch.nn.functional.pad(tensor[:, 1:], (0, 1))
