"""p(t) re-fitted while it is used: the losses that training computes anyway, exponentially forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mdm.diffusion.calibrator import Calibrator
from megatron_mdm.diffusion.densities import kl_divergence
from megatron_mdm.diffusion.judge import Judge
from megatron_mdm.diffusion.moments import MomentSums
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.training.callbacks.base import Callback, Order, State
from megatron_mdm.training.loop import StepResult
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState


class Refit(Callback):
    """Every `calibration.refit_every` steps, fit p(t) again and sample it from the next step on.

    The statistics come from every rank's rows of each global batch and are the same on all ranks; they and the density
    are part of the checkpoint. Moments are conditional on t, so the density that drew t needs no correction.
    """

    name = "refit"
    order = Order.REFIT

    def __init__(self, calibrator: Calibrator, noiser: Noiser, artifact: dict[str, Any], metrics: MetricsLog) -> None:
        settings = calibrator.settings
        self.calibrator = calibrator
        self.noiser = noiser
        self.metrics = metrics
        self.every = settings.refit_every
        self.memory = 0.5 ** (1.0 / settings.refit_half_life)
        self.first = TabulatedSampler(np.array(artifact["cell_density"]))
        # What the true gradients allowed at the start; training measures none of single samples.
        self.least_floor = artifact["uniform_floor"] if settings.is_judged_by_gradients else 0.0
        folds = np.array(artifact["moments"])
        # Sums over the even and the odd steps, and over the steps since the last re-fit.
        self.halves = [MomentSums(folds[0::2].sum(0)), MomentSums(folds[1::2].sum(0))]
        self.recent = MomentSums(0 * folds[0])
        self.cell_density: list[float] = []  # the re-fitted p(t); empty: the calibration's

    def state_dict(self) -> State:
        sums = [part.sums.tolist() for part in (*self.halves, self.recent)]
        return {"moment_sums": sums, "cell_density": self.cell_density}

    def load_state_dict(self, saved: State) -> None:
        if saved["moment_sums"]:
            *self.halves, self.recent = (MomentSums(np.array(sums)) for sums in saved["moment_sums"])
        self.cell_density = saved["cell_density"]
        if self.cell_density:
            self.noiser.use(TabulatedSampler(np.array(self.cell_density)))

    def after_step(self, state: TrainState, result: StepResult) -> None:
        nothing = MomentSums(np.zeros_like(self.recent.sums))
        mine = result.step % 2
        new = nothing if result.is_skipped else MomentSums.of(result.moments, len(nothing.sums))
        self.halves = [
            half.plus(new if index == mine else nothing, self.memory) for index, half in enumerate(self.halves)
        ]
        self.recent = self.recent.plus(new)
        if state.step % self.every == 0:
            self._refit(state.step)
            self.recent = nothing

    def _refit(self, step: int) -> None:
        present = self.noiser.sampler
        assert isinstance(present, TabulatedSampler)
        cells = np.concatenate([half.sums for half in self.halves])
        judge = self.calibrator.judge(cells, np.repeat([0, 1], len(cells) // 2), num_folds=2)
        fit = self.calibrator.fit(self.halves, judge)
        fit = fit.with_floor(max(fit.floor, self.least_floor))
        # what was drawn since the last re-fit is news to the present density as to the first
        recently = self.calibrator.judge(self.recent.sums)
        before = recently.efficiency([present.cell_density])
        self.metrics.write(
            step,
            {
                "refit_kl_divergence": kl_divergence(present.cell_density, fit.sampler.cell_density),
                "refit_efficiency": fit.efficiency(judge).of_sampler,
                "refit_efficiency_before": before.of_sampler,
                "refit_efficiency_without": recently.efficiency([self.first.cell_density]).of_sampler,
                "refit_efficiency_of_uniform": before.of_uniform,
                "refit_uniform_floor": fit.floor,
            },
        )
        self.noiser.use(fit.sampler)
        self.cell_density = fit.sampler.cell_density.tolist()


class JudgeSampler(Callback):
    """At every validation, the efficiency that the present p(t) has on the losses just validated, beside that of the
    calibration's p(t) and of uniform t (diffusion/judge.py). For estimators of one Bernoulli mask at linear
    rates, which is what validation measures."""

    order = Order.JUDGE

    def __init__(
        self,
        noiser: Noiser,
        artifact: dict[str, Any],
        validation: FixedGridValidation,
        every: int,
        metrics: MetricsLog,
    ) -> None:
        self.noiser = noiser
        self.validation = validation
        self.every = every
        self.metrics = metrics
        self.first = TabulatedSampler(np.array(artifact["cell_density"]))

    def after_step(self, state: TrainState, _: StepResult) -> None:
        if state.step % self.every == 0:
            self._judge(state)

    def _judge(self, state: TrainState) -> None:
        moments, known = self.validation.moments()
        judge = Judge(moments, known, "second_moment")
        present = judge.efficiency([self.noiser.sampler.density(CENTRES)])
        values = {
            "validation_efficiency": present.of_sampler,
            "validation_efficiency_without_refit": judge.efficiency([self.first.cell_density]).of_sampler,
            "validation_efficiency_of_uniform": present.of_uniform,
        }
        self.metrics.write(state.step, values)
