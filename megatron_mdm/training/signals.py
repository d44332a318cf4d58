"""SIGTERM and SIGUSR1: all ranks save after the same step and end, to be resumed."""

from __future__ import annotations

import signal
from types import FrameType

from megatron_mdm.parallel.collectives import largest
from megatron_mdm.parallel.environment import STOP_SIGNALS
from megatron_mdm.training.callbacks.base import Callback, Order
from megatron_mdm.training.loop import StepResult
from megatron_mdm.training.state import TrainState


class StopOnSignal(Callback):
    """Stops a run on a signal. Launchers signal every rank, at slightly different times, or one: all stop together.

    From its construction on, the signals no longer end this process at once: a second one must not spoil the last save.
    """

    order = Order.SIGNALS

    def __init__(self) -> None:
        self.received = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def after_step(self, state: TrainState, _: StepResult) -> None:
        received = largest(self.received)
        if received and not state.stop_reason:
            name = signal.Signals(received).name
            state.stop_reason = f"stopped by {name}; resume with --resume"
            state.interrupted = True

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
