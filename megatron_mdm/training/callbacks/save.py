"""Checkpoints: when they are due, and what becomes of one that cannot be written."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from megatron_mdm.checkpoint.store import VALIDATION_LOSS, CheckpointStore, SaveError
from megatron_mdm.config.errors import UserError
from megatron_mdm.models.parameters import checkpoint_bytes
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.training.callbacks.base import Callback, Callbacks, Order
from megatron_mdm.training.loop import StepResult, Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import SavedState, TrainState, saved_state

_SLOWEST_DISK = 2e8  # bytes per second that all ranks together write, at which a save does not pass for a hang


class Save(Callback):
    """A checkpoint every `checkpoint.save_every` steps, at the end, and, with `checkpoint.keep_best`, after every
    validation that is the best so far.

    One that cannot be written costs a line, and training goes on to the next; at the end, it is the program's error.
    """

    order = Order.SAVE

    def __init__(
        self, trainer: Trainer, store: CheckpointStore, metrics: MetricsLog, fingerprint: str, callbacks: Callbacks
    ) -> None:
        """fingerprint: of the training data, which a resumed run's must equal. callbacks: whose state is saved."""
        self.callbacks = callbacks
        self.source = trainer.source
        self.store = store
        self.engine = trainer.engine
        self.metrics = metrics
        self.fingerprint = fingerprint
        config = trainer.config
        self.every = config.checkpoint.save_every
        self.asynchronous = config.checkpoint.asynchronous
        self.keeps_best = config.checkpoint.keep_best is True
        self.last_step = -1  # of the last checkpoint that was begun and has not failed
        self.seconds = checkpoint_bytes(config.model) / _SLOWEST_DISK

    def after_step(self, state: TrainState, _: StepResult) -> None:
        began = time.perf_counter()
        is_best = self.keeps_best and state.best_step == state.step
        is_due = (is_best or (self.every and state.step % self.every == 0)) and not state.rewinding
        if is_due or state.rewinding or not self.store.is_writing():
            self._finish()
        if is_due:
            self._begin(state)
            if not self.asynchronous:
                self._finish()
            self.metrics.write(state.step, {"time_save": time.perf_counter() - began})

    def after_run(self, state: TrainState) -> None:
        self._finish()
        if self.last_step == state.step:
            return
        self._begin(state)
        try:
            self.store.finish()
        except SaveError as error:
            raise UserError(
                f"{error}: the run has trained to step {state.step}, and --resume resumes from the newest checkpoint "
                "there is; make room, or give the right to write, before it"
            ) from None

    def _begin(self, state: TrainState) -> None:
        enter(f"the checkpoint of step {state.step}", extra_seconds=self.seconds)
        parts = SavedState.of(self.callbacks, self.source)
        content = {"data": self.fingerprint, **saved_state(state, parts)}
        if state.validated_step == state.step:
            content[VALIDATION_LOSS] = state.validation_loss
        self.last_step = state.step
        self.store.save(state.step, self.engine, content, parts.arrays)

    def _finish(self) -> None:
        """Wait for what is being written, if anything is; say so where it could not be."""
        if self.store.is_writing():
            enter(f"the checkpoint of step {self.last_step}", extra_seconds=self.seconds)
        try:
            self.store.finish()
        except SaveError as error:
            if self.store.context.is_main:
                tqdm.write(f"error: step {self.last_step}: {error}; training goes on", file=sys.stderr)
            self.last_step = -1
