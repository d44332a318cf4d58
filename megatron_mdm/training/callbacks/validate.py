"""Validation, and early stopping by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_mdm.evaluation.validation import Validation
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.training.callbacks.base import AtValidations, Order, State
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState


class Validate(AtValidations):
    """Validation loss every so many steps and at the end; stops a run that no longer improves."""

    name = "validate"
    order = Order.VALIDATE

    def __init__(
        self,
        every: int,
        patience: int,
        validation: Validation,
        trainer: Trainer,
        metrics: MetricsLog,
        found: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """every: steps. patience: validations without a new best; 0: it never stops a run. found: what else there is to
        log of the last validation."""
        super().__init__(every)
        self.patience = patience
        self.validation = validation
        self.found = found
        self.trainer = trainer
        self.metrics = metrics
        self.validations_without_best = 0

    def state_dict(self) -> State:
        return {"validations_without_best": self.validations_without_best}

    def load_state_dict(self, saved: State) -> None:
        self.validations_without_best = saved["validations_without_best"]

    def at_validation(self, state: TrainState) -> None:
        enter(f"the validation after step {state.step}")
        loss = self.validation(self.trainer.engine)
        state.validated_step = state.step
        state.validation_loss = loss
        if loss < state.best_validation:
            state.best_validation = loss
            state.best_step = state.step
            self.validations_without_best = 0
        else:
            self.validations_without_best += 1
        values = {"validation_loss": loss, "best_validation_loss": state.best_validation, **self.found()}
        self.metrics.write(state.step, values)
        if self.patience and self.validations_without_best >= self.patience:
            state.stop_reason = f"no better validation loss in {self.patience} validations"
