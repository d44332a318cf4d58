"""Where a step's micro-batches come from, and what is made of their losses: the loop knows neither data nor noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.batch import LossWeights, ModelInputs
from megatron_mdm.data.loader import LocalBatch, PrefetchLoader, TrainLoader
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import Moments, group_moments
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import GlobalBatch, weighted_masked
from megatron_mdm.engine.base import TrainOutput
from megatron_mdm.engine.inputs import InputLayout
from megatron_mdm.evaluation.losses import WeightSums
from megatron_mdm.models.adapter_dropout import with_dropout_keys
from megatron_mdm.objectives.base import Noise, Objective
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.ahead import OneStepAhead

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepFacts:
    """What a source says of a step, the same on every rank; arrays are by position in the global batch [n]."""

    loss: float  # the quantity that was minimised: the global batch's mean, weights included
    t: Floats
    weight: Floats  # 1/p(t)
    sample_loss: Floats  # per-sample loss, mean over views, without the importance weight
    term: Floats  # loss is their mean: the weighted loss times the sample's share by diffusion.normalization
    moments: Floats  # [n, len(Moments._fields)], for re-fitting p(t): see diffusion/moments.py
    num_tokens: int  # of the samples, one view of each
    num_views: int
    num_computed: int  # tokens of this rank's part, padding included
    num_selected: int  # positions whose loss was taken, in all views
    sample_ids: Ints  # [n] rows of the data set
    metrics: dict[str, float] = field(default_factory=dict)  # more to log, by name


class Prepared(NamedTuple):
    """A step's work before its forward pass."""

    micro_batches: list[ModelInputs]  # of this data-parallel rank, on the host
    content: Any  # what collect() needs of them, the source's own


class BatchSource(Protocol):
    """A source of batches: an optimizer step takes what prepare() makes, collect() is given what came out. All calls
    are collective."""

    def prepare(self, step: int) -> Prepared:
        """The micro-batches of a step, which counts from 0. None on any rank: the step has no gradient and is counted
        without an update."""
        ...

    def collect(self, step: int, prepared: Prepared, output: TrainOutput) -> StepFacts: ...

    def state_dict(self) -> dict[str, Any]:
        """The source's state after a step, JSON-able: it is part of every checkpoint."""
        ...

    def state_arrays(self) -> Mapping[str, NDArray[Any]]:
        """What of it is too large for JSON, by name, the same on every rank. Nothing changes them afterwards."""
        ...

    def load_state_dict(self, saved: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what state_dict and state_arrays gave."""
        ...

    def times(self, step: int) -> tuple[Floats, Floats]:
        """Mask rate t and importance weight of a step's samples."""
        ...


class DrawnBatches(NamedTuple):
    """This data-parallel rank's part of a step's batch, without the weights of its losses."""

    local: LocalBatch
    noised: list[NoisedBatch]


class NoisedBatches(NamedTuple):
    """This data-parallel rank's part of a step's batch."""

    local: LocalBatch
    noised: list[NoisedBatch]
    weights: list[LossWeights]


class Summed(NamedTuple):
    """A step's batch, and by micro-batch the sums over its tokens that need no losses: they are made before these."""

    batch: NoisedBatches
    weights: list[WeightSums]
    num_masked: list[Tensor]  # [B] int64: positions that are scored, in all views


class SupervisedSource:
    """Training samples in the loader's order, noised by the objective. Pure in the step and the sampler of t, so it has
    no state."""

    def __init__(
        self,
        context: ParallelContext,
        loader: TrainLoader | PrefetchLoader,
        objective: Objective,
        noise: Noise,
        layout: InputLayout | None = None,
        dropout_seed: int | None = None,
    ) -> None:
        """noise: clean micro-batches → what is scored where. layout: how the engine takes micro-batches, which are then
        made ready for it a step ahead, on a thread; None: they are made when they are asked for, as the objective
        gives them. dropout_seed: with keys for dropout of adapters, drawn by it; None: without."""
        self.context = context
        self.loader = loader
        self.objective = objective
        self.noise = noise
        self.dropout_seed = dropout_seed
        self.ready = layout.ahead if layout else _as_they_are
        self._draw_step: Callable[[int], DrawnBatches] = self._draw
        self._prepare_step: Callable[[int], Prepared] = self._prepare
        if layout and objective.normalization.counts_masked:  # what ranks communicate stays on the main thread
            self._draw_step = OneStepAhead(self._draw, noise.times)
        elif layout:
            self._prepare_step = OneStepAhead(self._prepare, noise.times)

    def prepare(self, step: int) -> Prepared:
        """clean → noised → weighted → the model's inputs."""
        return self._prepare_step(step)

    def _prepare(self, step: int) -> Prepared:
        batch = self.noised_batch(step)
        inputs = [self.objective.inputs(*pair) for pair in zip(batch.noised, batch.weights)]
        if self.dropout_seed is not None:
            positions = [micro_batch.positions for micro_batch in batch.local.micro_batches]
            inputs = [with_dropout_keys(each, self.dropout_seed, step, at) for each, at in zip(inputs, positions)]
        weights = [WeightSums.of(*pair, batch.local.global_batch) for pair in zip(batch.noised, batch.weights)]
        num_masked = [micro.masked.sum(1).view(micro.views, -1).sum(0) for micro in batch.noised]
        return Prepared([self.ready(each) for each in inputs], Summed(batch, weights, num_masked))

    def collect(self, step: int, prepared: Prepared, output: TrainOutput) -> StepFacts:
        summed: Summed = prepared.content
        batch = summed.batch
        values = self._values(summed, output)
        t, weight = self.times(step)
        return StepFacts(
            loss=float(values[:, 0].sum()),
            t=t,
            weight=weight,
            sample_loss=values[:, 1],
            term=values[:, 0] * len(values),
            moments=values[:, 4:],
            num_tokens=batch.local.num_tokens,
            num_views=batch.noised[0].views,
            num_computed=batch.local.num_computed,
            num_selected=int(values[:, 3].sum()),
            sample_ids=values[:, 2].astype(np.int64),
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def state_arrays(self) -> Mapping[str, NDArray[Any]]:
        return {}

    def load_state_dict(self, saved: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        pass

    def times(self, step: int) -> tuple[Floats, Floats]:
        return self.noise.times(step)

    def noised_batch(self, step: int) -> NoisedBatches:
        """This data-parallel rank's part of a step's batch: a function of the step and the sampler of t alone.

        Collective over the data-parallel ranks where the normalisation counts the masked tokens of the global batch.
        """
        batch, noised = self._draw_step(step)
        normalize = self.objective.normalization
        if normalize.counts_masked:
            batch = batch._replace(global_batch=self._with_masked(batch.global_batch, noised))
        return NoisedBatches(batch, noised, [normalize(micro, batch.global_batch) for micro in noised])

    def _draw(self, step: int) -> DrawnBatches:
        batch = self.loader.batch(step)
        return DrawnBatches(batch, [self.noise(micro_batch, step) for micro_batch in batch.micro_batches])

    def _with_masked(self, batch: GlobalBatch, noised: Sequence[NoisedBatch]) -> GlobalBatch:
        """The global batch with its number of masked tokens, summed by position: the same bits on every layout."""
        masked = np.zeros(self.loader.global_size)
        for micro in noised:
            masked[micro.clean.positions.numpy()] = weighted_masked(micro).numpy()
        return batch._replace(num_masked=float(fill_from_data_ranks(masked, self.context).sum()))

    def _values(self, summed: Summed, output: TrainOutput) -> Floats:
        """Values [n, 4 + …] of every rank's samples, by position: share of the global loss, the sample's own loss, its
        row of the data, positions that were scored, moments."""
        values = np.zeros((self.loader.global_size, 4 + len(Moments._fields)))
        batch = summed.batch
        of_micro_batches = zip(batch.noised, batch.weights, summed.weights, summed.num_masked, output.statistics)
        for micro, weight, sums, num_masked, rows in of_micro_batches:
            loss = rows.loss.double().view(micro.views, -1)  # [V, B]
            positions = micro.clean.positions.numpy()
            t = micro.t.numpy()
            values[positions, 0] = (loss * weight.row.double().view(micro.views, -1)).sum(0).numpy()
            values[positions, 1] = loss.mean(0).numpy()
            values[positions, 2] = micro.clean.sample_ids.numpy()
            values[positions, 3] = num_masked.numpy()
            q = self.noise.mask_probability(t)
            values[positions, 4:] = group_moments(t, q, sums.with_losses(rows))
        return fill_from_data_ranks(values, self.context)


def _as_they_are(inputs: ModelInputs) -> ModelInputs:
    return inputs
