"""Validation losses without noise of their own.

Masked: a fixed stratified grid of t with common random numbers. The same (sample, t, mask) triples at every validation,
in every run and for every training method: curves of different samplers can be compared, and the noise of t and of the
masks cancels from their differences. Autoregressive: the negative log-likelihood itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_mdm.data.collate import collate
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.autoregressive import next_tokens
from megatron_mdm.diffusion.mask_schedule import Floats, MaskSchedule
from megatron_mdm.diffusion.masking import bernoulli
from megatron_mdm.diffusion.noiser import CleanBatch, NoisedBatch, noise
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.packets import loss_packet
from megatron_mdm.models.stages import Packet, RowStatistics
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext

_VALIDATION_SEED = 0  # of masks and grid: not the run's seed, so that runs can be compared


class Forward(Protocol):
    def evaluate(self, packets: Sequence[Packet]) -> list[RowStatistics]: ...


class Validation:
    """The mean loss of some rows of a data set, spread over the data-parallel ranks. A subclass says what is scored."""

    def __init__(
        self,
        data: SftDataset,
        *,
        num_samples: int,
        num_times: int,
        micro_size: int,
        schedule: MaskSchedule,
        mask_id: int,
        pad_id: int,
        context: ParallelContext,
    ) -> None:
        self.data, self.micro_size, self.schedule = data, micro_size, schedule
        self.mask_id, self.pad_id, self.context = mask_id, pad_id, context
        rows = np.tile(np.arange(min(num_samples, len(data))), self._repeats(num_times))
        self.rows = rows[np.argsort(data.lengths()[rows], kind="stable")]  # like lengths share a micro-batch

    def __call__(self, engine: Forward) -> float:
        """Mean loss over the rows, nats per eligible token. Collective; the same on every rank."""
        losses = np.zeros(len(self.rows))
        places, packets = self._micro_batches()
        for place, rows in zip(places, engine.evaluate(packets)):
            if place is not None:
                losses[place] = rows.loss.double().cpu().numpy()
        return float(fill_from_data_ranks(losses, self.context).mean())

    def _repeats(self, num_times: int) -> int:
        raise NotImplementedError

    def _scored(self, batch: CleanBatch, places: slice) -> NoisedBatch:
        raise NotImplementedError

    def _micro_batches(self) -> tuple[list[slice | None], list[Packet]]:
        """This data-parallel rank's share; every rank has as many, some only to keep step (places None)."""
        starts = range(0, len(self.rows), self.micro_size)
        ranks, rank = self.context.layout.data, self.context.data_rank
        turns = -(-len(starts) // ranks)
        all_places: list[slice | None] = []
        packets = []
        for turn in range(turns):
            index = turn * ranks + rank
            places = slice(starts[min(index, len(starts) - 1)], starts[min(index, len(starts) - 1)] + self.micro_size)
            rows = self.rows[places]
            batch = collate([self.data.samples[row] for row in rows], range(len(rows)), rows, self.pad_id)
            noised = self._scored(batch, places)
            packets.append(loss_packet(noised, NORMALIZATIONS["sample"](noised, GlobalBatch(1, 1))))
            all_places.append(places if index < len(starts) else None)
        return all_places, packets


class FixedGridValidation(Validation):
    """The bound −log p(x0)/P per sample (method, Section 1), averaged over uniform t and over the samples."""

    def __init__(self, data: SftDataset, **settings: Any) -> None:
        super().__init__(data, **settings)
        strata = stream(_VALIDATION_SEED, Purpose.VALIDATION).permutation(len(self.rows))
        self.t = (strata + 0.5) / len(self.rows)

    def _repeats(self, num_times: int) -> int:
        return num_times

    def _scored(self, batch: CleanBatch, places: slice) -> NoisedBatch:
        t, first = self.t[places], places.start
        generators = [stream(_VALIDATION_SEED, Purpose.VALIDATION, 1, first + offset) for offset in range(len(t))]
        weight: Floats = np.ones(len(t))
        return noise(
            batch, t, weight, generators, schedule=self.schedule, rule=bernoulli, views=1, mask_id=self.mask_id
        )


class NextTokenValidation(Validation):
    """−log p(x0)/P per sample of an autoregressive model, averaged over the samples, each once."""

    def _repeats(self, num_times: int) -> int:
        return 1

    def _scored(self, batch: CleanBatch, places: slice) -> NoisedBatch:
        return next_tokens(batch)


VALIDATIONS: dict[str, type[Validation]] = {"masked": FixedGridValidation, "autoregressive": NextTokenValidation}
