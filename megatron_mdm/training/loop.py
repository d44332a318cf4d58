"""The training loop: a table of contents."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.base import Engine, TrainOutput
from megatron_mdm.engine.clock import CommunicationProfile
from megatron_mdm.parallel.cores import core_wait
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.training.callbacks.base import Callback
from megatron_mdm.training.schedules import learning_rate
from megatron_mdm.training.source import BatchSource, StepFacts
from megatron_mdm.training.state import TrainState

_NO_UPDATE = TrainOutput([], 0.0)


@dataclass(frozen=True, kw_only=True)
class StepResult(StepFacts):
    """One optimizer step: what its source says of it, and what it took. Times are this rank's."""

    step: int  # from 0
    is_empty: bool  # nothing in it had a gradient: no optimizer step
    grad_norm: float
    lr: float
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
    source: BatchSource
    engine: Engine
    num_steps: int

    def train(self, state: TrainState, callbacks: Iterable[Callback]) -> None:
        """Train from state.step to the end, or until a callback stops the run or wants it to go back."""
        while state.step < self.num_steps and not state.stop_reason:
            enter(f"step {state.step + 1}")
            result = self.train_step(state.step)
            state.step += 1
            state.num_empty += result.is_empty
            for callback in callbacks:
                callback.after_step(state, result)
            if state.rewinding:
                return
        for callback in callbacks:
            callback.after_run(state)

    def train_step(self, step: int) -> StepResult:
        """The source's micro-batches → one optimizer step → what the source makes of their losses."""
        clock = self.engine.clock
        began = time.perf_counter()
        waited = core_wait()
        clock.reset()
        clock.is_exact = self.is_sampled(step)
        with CommunicationProfile(self.is_sampled(step)) as profile:
            with clock.measure("data"):
                prepared = self.source.prepare(step)
            lr = learning_rate(step, self.num_steps, self.config.optimizer.lr, self.config.schedule)
            micro_batches = prepared.micro_batches
            output = self.engine.train_batch(micro_batches, lr) if micro_batches else _NO_UPDATE
            facts = self.source.collect(step, prepared, output)
            seconds = time.perf_counter() - began
            waited = core_wait() - waited
        return StepResult(
            **vars(facts),
            step=step,
            is_empty=not micro_batches,
            grad_norm=output.grad_norm,
            lr=lr,
            seconds=seconds,
            phases=clock.close(seconds),
            communication=profile.read(),
            core_wait=waited,
        )

    def is_sampled(self, step: int) -> bool:
        """Whether a step's communication is measured, too."""
        every = self.config.logging.profile_every
        return every > 0 and (step + 1) % every == 0
