"""What a training callback is, the order in which callbacks run, and their state in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which runs callbacks
    from megatron_mdm.training.loop import StepResult
    from megatron_mdm.training.state import TrainState

State = dict[str, Any]  # what JSON holds


class Order(IntEnum):
    """Callbacks run in ascending order; one from elsewhere may take any whole number."""

    FAULTS = 0  # before those that change the sampler of t: a batch that is dumped is made again with it
    LOG = 10  # likewise: its control variate needs the density that drew the step's t
    RANKS = 20
    REFIT = 30
    VALIDATE = 40
    PREVIEW = 45
    JUDGE = 50  # reads the losses just validated, as clipping does
    CLIPPING = 60
    SIGNALS = 90
    SAVE = 100  # its checkpoints hold the state that the others have after the step


class Callback:
    """Watches a run: subclasses override what they need. after_step may set state.stop_reason.

    What a callback carries from step to step is its own: state_dict goes into every checkpoint under its name, and a
    resumed run hands it to load_state_dict before the first step.
    """

    name = ""  # of its state in checkpoints; empty: it has none
    order: int = Order.LOG

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """After every optimizer step, on every rank; state.step counts it already."""

    def after_run(self, state: TrainState) -> None:
        """Once, after the last step or where the run was stopped."""

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, saved: State) -> None:
        """Take back what state_dict gave."""


class AtValidations(Callback):
    """Does something after every so many steps, and at the end of a run that no signal stopped."""

    def __init__(self, every: int) -> None:
        self.every = every

    def at_validation(self, state: TrainState) -> None:
        raise NotImplementedError

    def after_step(self, state: TrainState, _: StepResult) -> None:
        if state.step % self.every == 0:
            self.at_validation(state)

    def after_run(self, state: TrainState) -> None:
        if state.step % self.every and not state.interrupted:
            self.at_validation(state)


class Callbacks:
    """A run's callbacks in their order."""

    def __init__(self) -> None:
        self._all: list[Callback] = []

    def add(self, callback: Callback) -> None:
        """Add one; callbacks of the same order run as they were added."""
        assert not callback.name or callback.name not in {other.name for other in self._all}, callback.name
        self._all = sorted([*self._all, callback], key=lambda each: each.order)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._all)

    def state_dict(self) -> dict[str, State]:
        """The callbacks' states by name."""
        return {callback.name: callback.state_dict() for callback in self._all if callback.name}

    def load_state_dict(self, saved: dict[str, State]) -> None:
        """Hand the callbacks their states; one that the run did not have before starts as it is."""
        for callback in self._all:
            if callback.name in saved:
                callback.load_state_dict(saved[callback.name])
