"""What is logged: progress bar, lines, records, tensorboard."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_mdm.config.schema import EmaConfig
from megatron_mdm.diffusion.control_variate import CONTROL_VARIATES, ControlVariate, WeightedLosses, bins_of
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.variance import BatchMeans, OnlineVariance
from megatron_mdm.parallel.progress import progress_bar
from megatron_mdm.training.callbacks.base import Callback, Order, State
from megatron_mdm.training.loop import StepResult, Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.source import SupervisedSource
from megatron_mdm.training.speed import Speed
from megatron_mdm.training.state import TrainState

NUM_T_BINS = 10


class Log(Callback):
    """Progress bar on the main rank; every `logging.every` steps a line, a JSON record and tensorboard points.

    What each figure means: training/README.md.
    """

    name = "log"
    order = Order.LOG

    def __init__(self, trainer: Trainer, metrics: MetricsLog, state: TrainState, speed: Speed) -> None:
        config = trainer.config
        self.every = config.logging.every
        self.metrics = metrics
        self.speed = speed
        self.source = trainer.source
        self.ema = config.diffusion.ema
        self.control_variate = _new_variate(self.ema) if self.ema.enabled else None
        self.run_variance = OnlineVariance()  # over the whole run
        self.window_variance = OnlineVariance()  # since the last log line
        self.window_bins = _empty_bins()  # by tenths of t, since the last log line: sums of losses, and their numbers
        self.t_histogram = [0] * NUM_T_BINS
        self.adjusted_means = BatchMeans()  # of the adjusted loss, since the last log line
        self.run_adjusted_means = BatchMeans()
        self.bar = progress_bar(
            total=trainer.num_steps, initial=state.step, desc="train", unit="step", enabled=trainer.context.is_main
        )

    def state_dict(self) -> State:
        variate = {"kind": self.ema.variate, **self.control_variate.state()} if self.control_variate else {}
        return {
            "run_variance": asdict(self.run_variance),
            "window_variance": asdict(self.window_variance),
            "window_bins": self.window_bins,
            "t_histogram": self.t_histogram,
            "control_variate": variate,
            "adjusted_means": asdict(self.adjusted_means),
            "run_adjusted_means": asdict(self.run_adjusted_means),
        }

    def load_state_dict(self, saved: State) -> None:
        self.run_variance = OnlineVariance.of_state(saved["run_variance"])
        self.window_variance = OnlineVariance.of_state(saved["window_variance"])
        self.window_bins = saved["window_bins"]
        self.t_histogram = saved["t_histogram"]
        self.adjusted_means = BatchMeans(**saved["adjusted_means"])
        self.run_adjusted_means = BatchMeans(**saved["run_adjusted_means"])
        variate = dict(saved["control_variate"])
        if self.control_variate and variate.pop("kind", "") == self.ema.variate:
            self.control_variate = CONTROL_VARIATES[self.ema.variate](**variate)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not (result.is_skipped or result.is_empty) and np.isfinite(result.sample_loss).all():
            self._count(result)
        self.speed.add(result)
        state.num_tokens += result.num_tokens
        text = f"loss {result.loss:.4f}, {self.speed.tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if state.step % self.every == 0:
            self.metrics.write(state.step, self._record(state, result))
            self.window_variance = self.window_variance.next_window()
            self.adjusted_means = self.adjusted_means.next_window()
            self.window_bins = _empty_bins()
            self.speed.reset()

    def after_run(self, _: TrainState) -> None:
        self.bar.close()

    def _count(self, result: StepResult) -> None:
        """Add a step to what is averaged over steps."""
        if self.control_variate:
            self._adjust(self.control_variate, result)
        for variance in (self.run_variance, self.window_variance):
            variance.update(result.weight, result.sample_loss, result.term)
        bins = bins_of(result.t, NUM_T_BINS)
        for index, count in enumerate(np.bincount(bins, minlength=NUM_T_BINS)):
            self.t_histogram[index] += int(count)
        losses, counts = np.array(self.window_bins)
        losses += np.bincount(bins, weights=result.sample_loss, minlength=NUM_T_BINS)
        counts += np.bincount(bins, minlength=NUM_T_BINS)
        self.window_bins = [losses.tolist(), counts.tolist()]

    def _adjust(self, variate: ControlVariate, result: StepResult) -> None:
        assert isinstance(self.source, SupervisedSource)
        assert isinstance(self.source.noise, Noiser)
        mass = self.source.noise.sampler.weighted_mass(self.ema.num_bins)
        batch = WeightedLosses(result.t, result.weight, result.term / result.weight, mass)
        adjusted = float(variate.adjusted(batch).mean())
        for means in (self.adjusted_means, self.run_adjusted_means):
            means.add(adjusted)
        variate.update(batch)

    def _record(self, state: TrainState, result: StepResult) -> dict[str, Any]:
        window = self.window_variance
        run = self.run_variance
        num_samples = len(result.term)
        ema = {
            "adjusted_loss": self.adjusted_means.mean(),
            "variance_of_adjusted_loss": num_samples * self.adjusted_means.variance(),
            "run_variance_of_adjusted_loss": num_samples * self.run_adjusted_means.variance(),
        }
        by_t = [loss / count if count else None for loss, count in zip(*self.window_bins)]
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
            **result.metrics,
        }


def _empty_bins() -> list[list[float]]:
    return [[0.0] * NUM_T_BINS, [0.0] * NUM_T_BINS]


def _new_variate(ema: EmaConfig) -> ControlVariate:
    return CONTROL_VARIATES[ema.variate].new(ema.num_bins, ema.rate)
