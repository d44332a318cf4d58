"""Losses of chosen (sample, t, masks), measured forward only and shared over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.collate import collate
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.moments import RowSums
from megatron_mdm.diffusion.noiser import NoisedBatch, noise
from megatron_mdm.diffusion.objective import GlobalBatch, LossWeights, Normalization
from megatron_mdm.engine.base import Forward
from megatron_mdm.engine.packets import loss_packet
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.models.stages import RowStatistics
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar

Generators = Callable[[int], np.random.Generator]  # the masks' random numbers of a place in the list of groups


def row_sums(noised: NoisedBatch, weights: LossWeights, batch: GlobalBatch, rows: RowStatistics) -> RowSums:
    """What the moments of a micro-batch's B groups need, [B, V] each, from its packets' weights and statistics.

    A row's weight in the batch, less the importance weight and the mean over samples and views, is part of the
    sample's estimate (normalisation 'token' weighs longer samples more).
    """
    expected = noised.sample_weight / (noised.views * batch.num_samples)
    share = (weights.row.double() / expected.repeat(noised.views))[:, None]
    token = weights.token.double() * share
    share = share[:, 0]
    columns = (
        rows.loss.double().cpu() * share,
        rows.square.double().cpu() * share**2,
        rows.gradient_square.double().cpu() * share**2,
        token.sum(1),
        token.square().sum(1),
    )
    return RowSums(*(column.view(noised.views, -1).t().numpy() for column in columns))


@dataclass(frozen=True)
class LossMeasurement:
    """Measures losses of one data set with one way of masking."""

    data: SftDataset
    design: MaskDesign
    normalization: Normalization
    special: SpecialIds
    micro_size: int  # rows of the model in a forward pass
    context: ParallelContext

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
        length) are cut once and dealt out. progress: a description for a progress bar; empty: none.
        """
        order = np.argsort(self.data.lengths()[samples], kind="stable")
        size = max(1, self.micro_size // self.design.views)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        values = np.zeros((len(RowSums._fields), len(samples), self.design.views))
        turns = progress_bar(
            list(self._turns(len(parts))), desc=progress, unit="batch", enabled=self.context.is_main and bool(progress)
        )
        batch = GlobalBatch(len(self.data), int(self.data.num_eligible().sum()))
        for indices in turns:
            noised = [self._noise(parts[min(i, len(parts) - 1)], samples, t, generators) for i in indices]
            weights = [self.normalization(micro, batch) for micro in noised]
            packets = [loss_packet(*pair) for pair in zip(noised, weights)]
            for i, micro, weight, rows in zip(indices, noised, weights, engine.evaluate(packets, row_gradients)):
                if i < len(parts):  # ranks without work repeated the last part, to keep step
                    values[:, parts[i]] = np.stack(row_sums(micro, weight, batch, rows))
        return RowSums(*fill_from_data_ranks(values, self.context))

    def _turns(self, num_parts: int) -> Iterator[list[int]]:
        """Parts that this rank measures in one call: enough to fill a pipeline."""
        ranks, together = self.context.layout.data, 2 * self.context.layout.pipeline
        for first in range(0, -(-num_parts // ranks), together):
            yield [(first + turn) * ranks + self.context.data_rank for turn in range(together)]

    def _noise(
        self, part: NDArray[np.int64], samples: NDArray[np.int64], t: Floats, generators: Generators
    ) -> NoisedBatch:
        rows = samples[part]
        batch = collate([self.data.samples[row] for row in rows], part, rows, self.special.pad)
        drawn = [generators(int(place)) for place in part]
        return noise(batch, t[part], np.ones(len(part)), drawn, design=self.design, mask_id=self.special.mask)
