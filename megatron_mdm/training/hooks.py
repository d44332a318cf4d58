"""What watches a run: log, validate, stop early, save."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_mdm.checkpoint.store import VALIDATION_LOSS, CheckpointStore, SaveError
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import EmaConfig, RunConfig
from megatron_mdm.diffusion.control_variate import CONTROL_VARIATES, ControlVariate, WeightedLosses, bins_of
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import ClippedSampler, least_variance_interval
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.models.parameters import checkpoint_bytes
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.parallel.progress import progress_bar
from megatron_mdm.training.loop import StepResult, Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.speed import Speed
from megatron_mdm.training.state import TrainState

NUM_T_BINS = 10
_SLOWEST_DISK = 2e8  # bytes per second that all ranks together write, at which a save does not pass for a hang


class Log:
    """Progress bar on the main rank; every `logging.every` steps a line, a JSON record and tensorboard points.

    Runs before the hooks that change the sampler of t. What each figure means: training/README.md.
    """

    def __init__(self, trainer: Trainer, metrics: MetricsLog, state: TrainState, speed: Speed) -> None:
        config, is_main, num_steps = trainer.config, trainer.context.is_main, trainer.num_steps
        self.every, self.metrics, self.speed, self.noiser = config.logging.every, metrics, speed, trainer.noiser
        self.ema = config.diffusion.ema
        self.control_variate = _control_variate(self.ema, state) if self.ema.enabled else None
        self.bar = progress_bar(total=num_steps, initial=state.step, desc="train", unit="step", enabled=is_main)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not result.is_skipped:
            self._count(state, result)
        self.speed.add(result)
        state.num_tokens += result.num_tokens
        text = f"loss {result.loss:.4f}, {self.speed.tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if state.step % self.every == 0:
            self.metrics.write(state.step, self._record(state, result))
            state.window_variance = state.window_variance.next_window()
            state.adjusted_means = state.adjusted_means.next_window()
            state.window_bins = [[0.0] * NUM_T_BINS, [0.0] * NUM_T_BINS]
            self.speed.reset()

    def after_run(self, _: TrainState) -> None:
        self.bar.close()

    def _count(self, state: TrainState, result: StepResult) -> None:
        """What is averaged over steps."""
        if self.control_variate:
            self._adjust(self.control_variate, state, result)
        for variance in (state.run_variance, state.window_variance):
            variance.update(result.weight, result.sample_loss, result.term)
        bins = bins_of(result.t, NUM_T_BINS)
        for index, count in enumerate(np.bincount(bins, minlength=NUM_T_BINS)):
            state.t_histogram[index] += int(count)
        losses, counts = np.array(state.window_bins)
        losses += np.bincount(bins, weights=result.sample_loss, minlength=NUM_T_BINS)
        counts += np.bincount(bins, minlength=NUM_T_BINS)
        state.window_bins = [losses.tolist(), counts.tolist()]

    def _adjust(self, variate: ControlVariate, state: TrainState, result: StepResult) -> None:
        assert isinstance(self.noiser, Noiser)
        mass = self.noiser.sampler.weighted_mass(self.ema.num_bins)
        batch = WeightedLosses(result.t, result.weight, result.term / result.weight, mass)
        adjusted = float(variate.adjusted(batch).mean())
        for means in (state.adjusted_means, state.run_adjusted_means):
            means.add(adjusted)
        variate.update(batch)
        state.control_variate = {"kind": self.ema.variate, **variate.state()}

    def _record(self, state: TrainState, result: StepResult) -> dict[str, Any]:
        window, run, num_samples = state.window_variance, state.run_variance, len(result.term)
        ema = {
            "adjusted_loss": state.adjusted_means.mean(),
            "variance_of_adjusted_loss": num_samples * state.adjusted_means.variance(),
            "run_variance_of_adjusted_loss": num_samples * state.run_adjusted_means.variance(),
        }
        by_t = [loss / count if count else None for loss, count in zip(*state.window_bins)]
        return {
            "loss": result.loss,
            "mean_loss": window.mean(),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": state.num_tokens,
            **self.speed.record(),
            "variance_of_loss": window.of_loss(),
            "variance_of_term": window.of_term(),
            "variance_of_estimator": window.of_estimator(),
            "run_variance_of_loss": run.of_loss(),
            "run_variance_of_term": run.of_term(),
            "run_variance_of_estimator": run.of_estimator(),
            "loss_by_t": by_t,
            **(ema if self.control_variate else {}),
        }


def _control_variate(ema: EmaConfig, state: TrainState) -> ControlVariate:
    """The one that a resumed run has, else a new one."""
    kind, saved = CONTROL_VARIATES[ema.variate], dict(state.control_variate)
    return kind(**saved) if saved.pop("kind", "") == ema.variate else kind.new(ema.num_bins, ema.rate)


class Validate:
    """Validation loss every `evaluation.every` steps and at the end; stops a run that no longer improves."""

    def __init__(
        self, config: RunConfig, validation: FixedGridValidation, trainer: Trainer, metrics: MetricsLog
    ) -> None:
        self.every, self.patience = config.evaluation.every, config.evaluation.patience
        self.validation, self.trainer, self.metrics = validation, trainer, metrics
        self.last_step = -1

    def after_step(self, state: TrainState, _: StepResult) -> None:
        if state.step % self.every == 0:
            self._validate(state)

    def after_run(self, state: TrainState) -> None:
        if self.last_step != state.step and state.step % self.every and not state.interrupted:
            self._validate(state)

    def _validate(self, state: TrainState) -> None:
        enter(f"the validation after step {state.step}")
        loss = self.validation(self.trainer.engine)
        self.last_step = state.step
        state.validated_step, state.validation_loss = state.step, loss
        if loss < state.best_validation:
            state.best_validation, state.best_step, state.validations_without_best = loss, state.step, 0
        else:
            state.validations_without_best += 1
        self.metrics.write(state.step, {"validation_loss": loss, "best_validation_loss": state.best_validation})
        if self.patience and state.validations_without_best >= self.patience:
            state.stop_reason = f"no better validation loss in {self.patience} validations"


class AdaptiveClipping:
    """The clipped schedule's interval, chosen anew at every validation: that whose losses vary least. Runs after
    Validate, whose losses it uses."""

    def __init__(
        self,
        config: RunConfig,
        validation: FixedGridValidation,
        noiser: Noiser,
        state: TrainState,
        metrics: MetricsLog,
    ) -> None:
        self.every, self.validation, self.noiser, self.metrics = config.evaluation.every, validation, noiser, metrics
        if state.clipping:
            noiser.use(ClippedSampler((state.clipping[0], state.clipping[1])))

    def after_step(self, state: TrainState, _: StepResult) -> None:
        if state.step % self.every == 0:
            bounds = least_variance_interval(self.validation.t, self.validation.losses)
            self.noiser.use(ClippedSampler(bounds))
            state.clipping = list(bounds)
            self.metrics.write(state.step, {"clipping_lower": bounds[0], "clipping_upper": bounds[1]})

    def after_run(self, _: TrainState) -> None:
        pass


class Save:
    """A checkpoint every `checkpoint.save_every` steps, at the end, and, with `checkpoint.keep_best`, after every
    validation that is the best so far. Runs after the hooks whose state it saves.

    One that cannot be written costs a line, and training goes on to the next; at the end, it is the program's error.
    """

    def __init__(self, trainer: Trainer, store: CheckpointStore, metrics: MetricsLog, fingerprint: str) -> None:
        """fingerprint: of the training data, which a resumed run's must equal."""
        self.store, self.engine, self.metrics, self.fingerprint = store, trainer.engine, metrics, fingerprint
        config = trainer.config
        self.every, self.asynchronous = config.checkpoint.save_every, config.checkpoint.asynchronous
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
                f"{error}: the run has trained to step {state.step}, and --resume goes on from the newest checkpoint "
                "there is; make room, or give the right to write, before it"
            ) from None

    def _begin(self, state: TrainState) -> None:
        enter(f"the checkpoint of step {state.step}", extra_seconds=self.seconds)
        content = {"data": self.fingerprint, "train": state.to_json()}
        if state.validated_step == state.step:
            content[VALIDATION_LOSS] = state.validation_loss
        self.last_step = state.step
        self.store.save(state.step, self.engine, content)

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
