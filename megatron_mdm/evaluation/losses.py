"""Losses of chosen (sample, t, masks), measured forward only and shared over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.batch import LossWeights, ModelInputs, RowStatistics
from megatron_mdm.data.collate import collate
from megatron_mdm.diffusion.exposure import SampleShapes, average_batch
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.moments import RowSums
from megatron_mdm.diffusion.noiser import NoisedBatch, noise
from megatron_mdm.diffusion.objective import GlobalBatch, Normalization
from megatron_mdm.engine.base import Forward
from megatron_mdm.engine.inputs import loss_inputs
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar

if TYPE_CHECKING:  # megatron-core, which reports do without
    from megatron_mdm.data.splits import Dataset

Places = NDArray[np.int64]  # in a list of what is to be measured
Scored = tuple[NoisedBatch, LossWeights]
Inputs = Callable[[NoisedBatch, LossWeights], ModelInputs]
Generators = Callable[[int], np.random.Generator]  # the masks' random numbers of a place in the list of groups


class WeightSums(NamedTuple):
    """What the moments of a micro-batch's B groups need of its weights alone, [V·B] float64 each.

    A row's weight in the batch, less the importance weight and the mean over samples and views, is part of the
    sample's estimate (normalisation 'token' weighs longer samples more).
    """

    views: int
    share: Tensor  # that part
    token: Tensor  # sums of the token weights with it
    token_square: Tensor  # and of their squares

    @classmethod
    def of(cls, noised: NoisedBatch, weights: LossWeights, batch: GlobalBatch) -> WeightSums:
        expected = noised.sample_weight / (noised.views * batch.num_samples)
        share = weights.row.double() / expected.repeat(noised.views)
        token = weights.token.double() * share[:, None]
        return cls(noised.views, share, token.sum(1), token.square().sum(1))

    def with_losses(self, rows: RowStatistics) -> RowSums:
        """[B, V] each."""
        columns = (
            rows.loss.double().cpu() * self.share,
            rows.square.double().cpu() * self.share**2,
            rows.gradient_square.double().cpu() * self.share**2,
            self.token,
            self.token_square,
        )
        return RowSums(*(column.view(self.views, -1).t().numpy() for column in columns))


def row_sums(noised: NoisedBatch, weights: LossWeights, batch: GlobalBatch, rows: RowStatistics) -> RowSums:
    """What the moments of a micro-batch's B groups need, [B, V] each, from its inputs' weights and statistics."""
    return WeightSums.of(noised, weights, batch).with_losses(rows)


@dataclass(frozen=True)
class LossMeasurement:
    """Measures losses of one data set with one way of masking."""

    data: Dataset
    design: MaskDesign
    normalization: Normalization
    special: SpecialIds
    micro_size: int  # rows of the model in a forward pass
    context: ParallelContext
    inputs: Inputs = loss_inputs

    def __call__(
        self,
        engine: Forward,
        samples: NDArray[np.int64],
        t: Floats,
        generators: Generators,
        *,
        row_gradients: bool = False,
        progress: str = "",
    ) -> RowSums:
        """Sums [n, V] of n groups: sample samples[i], noised at t[i] with the random numbers of generators(i).

        Collective; bit-identical for every number of data-parallel ranks, as micro-batches (of samples of like
        length) are cut once and distributed. progress: a description for a progress bar; empty: none.
        """
        shapes = SampleShapes.of(self.data.num_eligible(), self.data.num_delimiters())
        batch = average_batch(self.design, shapes)
        values = np.zeros((len(RowSums._fields), len(samples), self.design.views))

        def scored(part: Places) -> Scored:
            rows = samples[part]
            clean = collate([self.data.samples[row] for row in rows], part, rows, self.special.pad)
            drawn = [generators(int(place)) for place in part]
            noised = noise(clean, t[part], np.ones(len(part)), drawn, design=self.design, mask_id=self.special.mask)
            return noised, self.normalization(noised, batch)

        size = max(1, self.micro_size // self.design.views)
        parts = parts_of_like_length(self.data.lengths()[samples], size)
        for part, (noised, weights), rows in measure(
            engine, parts, scored, self.context, self.inputs, row_gradients, progress
        ):
            values[:, part] = np.stack(row_sums(noised, weights, batch, rows))
        return RowSums(*fill_from_data_ranks(values, self.context))


def parts_of_like_length(lengths: NDArray[np.int64], size: int) -> list[Places]:
    """Places 0 … n−1 in micro-batches, by length, so that they pad little."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def measure(
    engine: Forward,
    parts: Sequence[Places],
    scored: Callable[[Places], Scored],
    context: ParallelContext,
    inputs: Inputs,
    row_gradients: bool = False,
    progress: str = "",
) -> Iterator[tuple[Places, Scored, RowStatistics]]:
    """Distribute micro-batches across the data-parallel ranks; yields this rank's with their losses. Collective.

    As many at a time as fill a pipeline. Ranks without work repeat the last micro-batch, to keep step.
    """
    ranks = context.layout.data
    together = 2 * context.layout.pipeline
    num_turns = -(-len(parts) // ranks)
    starts = range(0, num_turns, together)
    for first in progress_bar(starts, desc=progress, unit="batch", enabled=context.is_main and bool(progress)):
        mine = [turn * ranks + context.data_rank for turn in range(first, min(first + together, num_turns))]
        batches = [scored(parts[min(index, len(parts) - 1)]) for index in mine]
        statistics = engine.evaluate([inputs(*batch) for batch in batches], row_gradients)
        for index, batch, rows in zip(mine, batches, statistics):
            if index < len(parts):
                yield parts[index], batch, rows
