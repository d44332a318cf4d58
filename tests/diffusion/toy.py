"""A toy model whose losses can be enumerated: cross-entropies looked up by (sample, mask), P small."""

from __future__ import annotations

import numpy as np
import torch

from megatron_mdm.diffusion.mask_schedule import Floats, MaskSchedule
from megatron_mdm.diffusion.noiser import CleanBatch, NoisedBatch
from megatron_mdm.diffusion.t_samplers import TSampler

P = 4
EPSILON = 0.1  # bounds the weights 1/q, so that sample variances settle
SCHEDULE = MaskSchedule(EPSILON)


class Toy:
    """num_samples sequences of P eligible tokens; tables [samples, 2^P, P] of positive cross-entropies."""

    def __init__(self, num_samples: int = 2, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        share = np.array([bin(mask).count("1") for mask in range(2**P)]) / P
        ease = 0.2 + 3.0 * share**2  # more masked: harder
        self.tables = generator.gamma(2.0, 0.5, (num_samples, 2**P, P)) * ease[None, :, None]
        self.bits = (np.arange(2**P)[:, None] >> np.arange(P)) & 1  # [2^P, P]

    def losses(self, noised: NoisedBatch, sample: Floats) -> Floats:
        """Per-sample losses [B], mean over views; sample [B] says which table each row of the batch uses."""
        masked = noised.masked.numpy().astype(int)
        index = (masked << np.arange(P)).sum(1)
        cross_entropy = self.tables[np.tile(sample, noised.views), index]
        row = (noised.token_weight.numpy() * cross_entropy).sum(1) / P
        return row.reshape(noised.views, -1).mean(0)

    def enumerate(self, t: Floats) -> tuple[Floats, Floats]:
        """E[l | t] and E[l² | t] for one view, over samples and all 2^P masks. t [T] → [T], [T]."""
        q = SCHEDULE.mask_probability(t)[:, None]
        count = self.bits.sum(1)
        probability = q**count * (1 - q) ** (P - count)  # [T, 2^P]
        loss = (self.tables * self.bits).sum(2)[:, None, :] / (P * q)  # [samples, T, 2^P]
        return (probability * loss).sum(2).mean(0), (probability * loss**2).sum(2).mean(0)


def midpoints(num: int = 20000) -> Floats:
    return (np.arange(num) + 0.5) / num


def exact_mean(toy: Toy) -> float:
    """L = ∫ E[l | t] dt."""
    return float(toy.enumerate(midpoints())[0].mean())


def exact_variance(toy: Toy, sampler: TSampler) -> float:
    """∫ E[l² | t] / p(t) dt − L²."""
    t = midpoints()
    mean, square = toy.enumerate(t)
    return float((square / sampler.density(t)).mean() - mean.mean() ** 2)


def clean_batch(size: int) -> CleanBatch:
    return CleanBatch(
        tokens=torch.full((size, P), 5),
        eligible=torch.ones(size, P, dtype=torch.bool),
        delimiters=torch.zeros(size, P, dtype=torch.bool),
        lengths=torch.full((size,), P),
        positions=torch.arange(size),
        sample_ids=torch.arange(size),
    )
