"""The training loop: a table of contents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.loader import LocalBatch, PrefetchLoader, TrainLoader
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.engine.base import Engine, TrainOutput
from megatron_mdm.engine.packets import loss_packet
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.schedules import learning_rate
from megatron_mdm.training.state import TrainState


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
    num_tokens: int
    seconds: float


class Hook(Protocol):
    """Something that watches a run. after_step may set state.stop_reason."""

    def after_step(self, state: TrainState, result: StepResult) -> None: ...

    def after_run(self, state: TrainState) -> None: ...


@dataclass(frozen=True)
class Trainer:
    """One run's parts."""

    config: RunConfig
    context: ParallelContext
    loader: TrainLoader | PrefetchLoader
    noiser: Noiser
    engine: Engine
    num_steps: int

    def train(self, state: TrainState, hooks: Sequence[Hook]) -> None:
        """Train from state.step to the end, or until a hook stops the run."""
        while state.step < self.num_steps and not state.stop_reason:
            result = self.train_step(state.step)
            state.step += 1
            for hook in hooks:
                hook.after_step(state, result)
        for hook in hooks:
            hook.after_run(state)

    def train_step(self, step: int) -> StepResult:
        """clean → noised → weighted → one optimizer step."""
        began = time.monotonic()
        batch = self.loader.batch(step)
        noised = [self.noiser(micro_batch, step) for micro_batch in batch.micro_batches]
        normalize = NORMALIZATIONS[self.config.diffusion.normalization]
        packets = [loss_packet(micro, normalize(micro, batch.global_batch)) for micro in noised]
        lr = learning_rate(step, self.num_steps, self.config.optimizer.lr, self.config.schedule)
        output = self.engine.train_batch(packets, lr)
        total, sample_loss = self._collect(batch, [packet.row_weight for packet in packets], output)
        t, weight = self.noiser.times(step)
        return StepResult(
            step, total, output.grad_norm, lr, t, weight, sample_loss, batch.num_tokens, time.monotonic() - began
        )

    def _collect(
        self, batch: LocalBatch, row_weights: Sequence[torch.Tensor], output: TrainOutput
    ) -> tuple[float, Floats]:
        """The global loss and per-sample losses [n] from every data-parallel rank's rows."""
        values = np.zeros((2, self.loader.global_size))
        for micro, row_weight, rows in zip(batch.micro_batches, row_weights, output.statistics):
            positions = micro.positions.numpy()
            shape = (self.noiser.views, len(positions))  # [V, B]; B may be 0
            loss = rows.loss.double().cpu().view(shape)
            values[0, positions] = (loss * row_weight.double().view(shape)).sum(0).numpy()
            values[1, positions] = loss.mean(0).numpy()
        values = fill_from_data_ranks(values, self.context)
        return float(values[0].sum()), values[1]
