"""From clean micro-batches to noised ones. Pure functions of (seed, step, position in the global batch, view)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.batch import AttentionPattern, CleanBatch
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import TSampler, stratified_quantiles


@dataclass(frozen=True)
class NoisedBatch:
    """A noised micro-batch. Row v·B + b is view v of sample b."""

    clean: CleanBatch
    noisy: Tensor  # [V·B, S] int64
    masked: Tensor  # [V·B, S] bool
    token_weight: Tensor  # [V·B, S] float32: 1/q at masked positions, 0 elsewhere
    sample_weight: Tensor  # [B] float64: importance weight 1/p(t)
    t: Tensor  # [B] float64
    views: int
    pattern: AttentionPattern  # of the V·B rows: which token sees which


def noise(
    batch: CleanBatch,
    t: Floats,
    sample_weight: Floats,
    generators: Sequence[np.random.Generator],
    *,
    design: MaskDesign,
    mask_id: int,
) -> NoisedBatch:
    """Mask each sample b at rate t[b], drawing its uniforms, one per eligible position, from generators[b]."""
    eligible = batch.eligible.numpy()
    delimiters = batch.delimiters.numpy()
    size, length = eligible.shape
    ordinary, marked = ((eligible & kind).sum(1, dtype=np.float64) for kind in (~delimiters, delimiters))
    probabilities = design.probabilities(np.asarray(t, dtype=np.float64), ordinary, marked)
    masked = np.zeros((design.views, size, length), dtype=bool)
    token_weight = np.zeros((design.views, size, length), dtype=np.float32)
    for b, (generator, q, delimiter_q) in enumerate(zip(generators, *probabilities)):
        places = np.flatnonzero(eligible[b])
        result = design.draw(generator, float(q), float(delimiter_q), delimiters[b, places])
        masked[:, b, places] = result.masked
        token_weight[:, b, places] = result.masked / result.probability
    masked_rows = torch.from_numpy(masked.reshape(-1, length))
    return NoisedBatch(
        clean=batch,
        noisy=batch.tokens.repeat(design.views, 1).masked_fill(masked_rows, mask_id),
        masked=masked_rows,
        token_weight=torch.from_numpy(token_weight.reshape(-1, length)),
        sample_weight=torch.from_numpy(np.asarray(sample_weight, dtype=np.float64)),
        t=torch.from_numpy(np.asarray(t, dtype=np.float64)),
        views=design.views,
        pattern=batch.pattern(design.views),
    )


class _Drawn(NamedTuple):
    """A step's mask rates and importance weights, and what drew them."""

    step: int
    sampler: TSampler
    times: tuple[Floats, Floats]


class Noiser:
    """Training noise: t stratified over the global batch, masks by counter, one or more views.

    One thread may draw a step's noise while another changes the sampler or asks for another step's t.
    """

    def __init__(
        self, *, design: MaskDesign, sampler: TSampler, num_strata: int, global_size: int, mask_id: int, seed: int
    ) -> None:
        self.design = design
        self.sampler = sampler
        self.num_strata = num_strata
        self.global_size = global_size
        self.mask_id = mask_id
        self.seed = seed
        self._drawn = _Drawn(-1, sampler, (np.empty(0), np.empty(0)))

    @property
    def views(self) -> int:
        return self.design.views

    def mask_probability(self, t: Floats) -> Floats:
        """p_mask(t), of any shape."""
        return self.design.schedule.mask_probability(t)

    def use(self, sampler: TSampler) -> None:
        """Draw t from another density from the next step on."""
        self.sampler = sampler

    def times(self, step: int) -> tuple[Floats, Floats]:
        """t [n] and importance weight 1/p(t) [n] of the whole global batch at a step, by position."""
        sampler = self.sampler
        drawn = self._drawn
        if drawn.step != step or drawn.sampler is not sampler:  # a step's micro-batches share them
            u = stratified_quantiles(self.seed, step, self.global_size, self.num_strata)
            drawn = _Drawn(step, sampler, sampler.quantile(u))
            self._drawn = drawn
        return drawn.times

    def __call__(self, batch: CleanBatch, step: int) -> NoisedBatch:
        t, weight = self.times(step)
        positions = batch.positions.numpy()
        generators = [stream(self.seed, Purpose.MASKS, step, int(position)) for position in positions]
        return noise(batch, t[positions], weight[positions], generators, design=self.design, mask_id=self.mask_id)
