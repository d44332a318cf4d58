"""What token weights amount to on average over masks: the known part of a loss's second moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import Bernoulli, MaskDesign
from megatron_mdm.diffusion.objective import GlobalBatch, Normalization
from megatron_mdm.diffusion.t_samplers import CENTRES


class Exposure(NamedTuple):
    """Expectations of sums of token weights w (0 where not masked), averaged over samples, at mask rates [T]."""

    total: Floats  # E[Σ_i w_i] of a row
    squares: Floats  # E[Σ_i w_i²] of a row
    pairs: Floats  # E[Σ_{i≠j} w_i w_j] within a row
    cross: Floats  # E[Σ_i Σ_j w_i w_j'] over ordered pairs of different rows of one sample, summed over those pairs
    views: int  # V: rows per sample


@dataclass(frozen=True)
class SampleShapes:
    """The eligible positions of a data set's samples: distinct (ordinary, delimiter) counts and their shares."""

    count: Floats  # [K]: positions that are no delimiters
    delimiter_count: Floats  # [K]
    share: Floats  # [K], sums to 1

    @classmethod
    def of(cls, num_eligible: NDArray[np.int64], num_delimiters: NDArray[np.int64]) -> SampleShapes:
        """Both [N], of every sample; num_eligible counts delimiters, too."""
        pairs = np.stack([num_eligible - num_delimiters, num_delimiters])
        distinct, counts = np.unique(pairs, axis=1, return_counts=True)
        return cls(distinct[0].astype(float), distinct[1].astype(float), counts / counts.sum())


def average_batch(design: MaskDesign, shapes: SampleShapes) -> GlobalBatch:
    """A global batch of one average sample at uniform t."""
    sizes = (shapes.count, shapes.delimiter_count)
    probabilities = design.probabilities(CENTRES[:, None], sizes[0][None, :], sizes[1][None, :])
    masked = sum((size * q).mean(0) @ shapes.share for size, q in zip(sizes, probabilities))
    return GlobalBatch(1.0, float(shapes.share @ (sizes[0] + sizes[1])), float(masked))


def exposure(
    design: MaskDesign, shapes: SampleShapes, normalization: Normalization, batch: GlobalBatch, t: Floats
) -> Exposure:
    """Exposure of one sample's rows at mask rates t [T], exact for every rule, ISAD, MIRROR and repeated masks.

    batch: the global batch that a sample's estimate is its part of.
    """
    sizes = (shapes.count, shapes.delimiter_count)
    probabilities = design.probabilities(t[:, None], sizes[0][None, :], sizes[1][None, :])
    eligible = sizes[0] + sizes[1]
    weights = [normalization.token_weight(q, eligible, batch) for q in probabilities]
    total, squares, deficit, excess = np.zeros((4, *probabilities[0].shape))
    for n, q, w, rule in zip(sizes, probabilities, weights, (design.rule, Bernoulli())):
        total += n * q * w
        squares += n * q * w**2
        deficit += n * w**2 * rule.same_view_deficit(q)
        excess += n * w**2 * rule.complementary_excess(q)
    partners = design.views if design.complementary else 0  # ordered pairs of complementary rows
    cross = design.views * (design.views - 1) * total**2 + partners * excess
    pairs = np.maximum(total**2 - deficit, 0.0)
    total, squares, pairs, cross = (values @ shapes.share for values in (total, squares, pairs, cross))
    return Exposure(total, squares, pairs, cross, design.views)


Exposures = Callable[[Floats], Exposure]  # of the estimator in use, as a function of t


def exposures(design: MaskDesign, shapes: SampleShapes, normalization: Normalization) -> Exposures:
    """exposure() as a function of t alone; its values at the samplers' cells are computed once."""
    batch = average_batch(design, shapes)
    at_cells = exposure(design, shapes, normalization, batch, CENTRES)
    return lambda t: at_cells if t is CENTRES else exposure(design, shapes, normalization, batch, t)
