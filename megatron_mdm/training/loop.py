"""The training loop: a table of contents."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.batch import LossWeights
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.loader import LocalBatch, PrefetchLoader, TrainLoader
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import Moments, group_moments
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import GlobalBatch, weighted_masked
from megatron_mdm.engine.base import Engine, TrainOutput
from megatron_mdm.engine.clock import CommunicationProfile
from megatron_mdm.evaluation.losses import row_sums
from megatron_mdm.objectives.base import Noise, Objective
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.cores import core_wait
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.training.callbacks.base import Callback
from megatron_mdm.training.schedules import learning_rate
from megatron_mdm.training.state import TrainState

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank; arrays are by position in the global batch [n]."""

    step: int  # from 0
    loss: float  # the quantity that was minimised: the global batch's mean, weights included
    grad_norm: float
    lr: float
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
    seconds: float
    phases: dict[str, float]  # seconds of this rank by phase: see engine/clock.py
    communication: float  # seconds of this rank within collectives; not a number but at sampled steps
    core_wait: float  # seconds without a core, while ready to run; not a number where the kernel does not tell

    @property
    def is_skipped(self) -> bool:
        """Whether weights and moments stayed as they were, as loss or gradient was infinite or not a number."""
        return not math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Trainer:
    """One run's parts."""

    config: RunConfig
    context: ParallelContext
    loader: TrainLoader | PrefetchLoader
    objective: Objective
    noiser: Noise  # clean micro-batches → what is scored where
    engine: Engine
    num_steps: int

    def train(self, state: TrainState, callbacks: Iterable[Callback]) -> None:
        """Train from state.step to the end, or until a callback stops the run or wants it to go back."""
        while state.step < self.num_steps and not state.stop_reason:
            enter(f"step {state.step + 1}")
            result = self.train_step(state.step)
            state.step += 1
            for callback in callbacks:
                callback.after_step(state, result)
            if state.rewinding:
                return
        for callback in callbacks:
            callback.after_run(state)

    def train_step(self, step: int) -> StepResult:
        """clean → noised → weighted → one optimizer step."""
        clock, began, waited = self.engine.clock, time.perf_counter(), core_wait()
        clock.reset()
        clock.is_exact = self.is_sampled(step)
        with CommunicationProfile(self.is_sampled(step)) as profile:
            with clock.measure("data"):
                batch, noised, weights = self.noised_batch(step)
                micro_batches = [self.objective.inputs(*pair) for pair in zip(noised, weights)]
            lr = learning_rate(step, self.num_steps, self.config.optimizer.lr, self.config.schedule)
            output = self.engine.train_batch(micro_batches, lr)
            values = self._collect(batch, noised, weights, output)
            seconds, waited = time.perf_counter() - began, core_wait() - waited
        t, weight = self.noiser.times(step)
        return StepResult(
            step=step,
            loss=float(values[:, 0].sum()),
            grad_norm=output.grad_norm,
            lr=lr,
            t=t,
            weight=weight,
            sample_loss=values[:, 1],
            term=values[:, 0] * len(values),
            moments=values[:, 4:],
            num_tokens=batch.num_tokens,
            num_views=noised[0].views,
            num_computed=batch.num_computed,
            num_selected=int(values[:, 3].sum()),
            sample_ids=values[:, 2].astype(np.int64),
            seconds=seconds,
            phases=clock.close(seconds),
            communication=profile.read(),
            core_wait=waited,
        )

    def is_sampled(self, step: int) -> bool:
        """Whether a step's communication is measured, too."""
        every = self.config.logging.profile_every
        return every > 0 and (step + 1) % every == 0

    def noised_batch(self, step: int) -> tuple[LocalBatch, list[NoisedBatch], list[LossWeights]]:
        """This data-parallel rank's part of a step's batch: a function of the step and the sampler of t alone.

        Collective over the data-parallel ranks where the normalisation counts the masked tokens of the global batch.
        """
        batch = self.loader.batch(step)
        noised = [self.noiser(micro_batch, step) for micro_batch in batch.micro_batches]
        normalize = self.objective.normalization
        if normalize.counts_masked:
            batch = batch._replace(global_batch=self._with_masked(batch.global_batch, noised))
        return batch, noised, [normalize(micro, batch.global_batch) for micro in noised]

    def _with_masked(self, batch: GlobalBatch, noised: Sequence[NoisedBatch]) -> GlobalBatch:
        """The global batch with its number of masked tokens, summed by position: the same bits on every layout."""
        masked = np.zeros(self.loader.global_size)
        for micro in noised:
            masked[micro.clean.positions.numpy()] = weighted_masked(micro).numpy()
        return batch._replace(num_masked=float(fill_from_data_ranks(masked, self.context).sum()))

    def _collect(
        self, batch: LocalBatch, noised: Sequence[NoisedBatch], weights: Sequence[LossWeights], output: TrainOutput
    ) -> Floats:
        """[n, 4 + …]: share of the global loss, sample's own loss, its row of the data, positions that were scored,
        moments; of every rank's samples, by position."""
        values = np.zeros((self.loader.global_size, 4 + len(Moments._fields)))
        for micro, weight, rows in zip(noised, weights, output.statistics):
            loss = rows.loss.double().cpu().view(micro.views, -1)  # [V, B]
            positions, t = micro.clean.positions.numpy(), micro.t.numpy()
            values[positions, 0] = (loss * weight.row.double().view(micro.views, -1)).sum(0).numpy()
            values[positions, 1] = loss.mean(0).numpy()
            values[positions, 2] = micro.clean.sample_ids.numpy()
            values[positions, 3] = micro.masked.sum(1).view(micro.views, -1).sum(0).numpy()
            q = self.noiser.mask_probability(t)
            values[positions, 4:] = group_moments(t, q, row_sums(micro, weight, batch.global_batch, rows))
        return fill_from_data_ranks(values, self.context)
