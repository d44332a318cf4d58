"""p(t) re-fitted while it is used: the losses that training computes anyway, exponentially forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mdm.diffusion.calibrator import Calibrator
from megatron_mdm.diffusion.densities import kl_divergence
from megatron_mdm.diffusion.moments import MomentSums
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import TabulatedSampler
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.training.loop import StepResult
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState


class Refit:
    """Every `calibration.refit_every` steps, fit p(t) anew and sample it from the next step on.

    The statistics come from every rank's rows of each global batch and are the same on all ranks; they and the density
    are part of the checkpoint. Moments are conditional on t, so the density that drew t needs no correction.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        noiser: Noiser,
        artifact: dict[str, Any],
        state: TrainState,
        metrics: MetricsLog,
    ) -> None:
        settings = calibrator.settings
        self.calibrator, self.noiser, self.metrics = calibrator, noiser, metrics
        self.every, self.memory = settings.refit_every, 0.5 ** (1.0 / settings.refit_half_life)
        self.first = TabulatedSampler(np.array(artifact["cell_density"]))
        if not state.moment_sums:
            state.moment_sums = artifact["moments"]
        if state.cell_density:
            noiser.use(TabulatedSampler(np.array(state.cell_density)))
        self.halves = [MomentSums(np.array(sums)) for sums in state.moment_sums]

    def after_step(self, state: TrainState, result: StepResult) -> None:
        nothing = MomentSums(np.zeros_like(self.halves[0].sums))
        mine = result.step % 2
        new = nothing if result.is_skipped else MomentSums.of(result.moments, len(nothing.sums))
        self.halves = [
            half.plus(new if index == mine else nothing, self.memory) for index, half in enumerate(self.halves)
        ]
        if state.step % self.every == 0:
            self._refit(state)
        state.moment_sums = [half.sums.tolist() for half in self.halves]

    def after_run(self, _: TrainState) -> None:
        pass

    def _refit(self, state: TrainState) -> None:
        present = self.noiser.sampler
        assert isinstance(present, TabulatedSampler)
        fit = self.calibrator.fit(self.halves)
        both = self.halves[0].plus(self.halves[1])
        self.metrics.write(
            state.step,
            {
                "refit_kl_divergence": kl_divergence(present.cell_density, fit.sampler.cell_density),
                "refit_efficiency": fit.efficiency.of_sampler,
                "refit_efficiency_before": self.calibrator.judge(both, present).of_sampler,
                "refit_efficiency_without": self.calibrator.judge(both, self.first).of_sampler,
                "refit_efficiency_of_uniform": fit.efficiency.of_uniform,
                "refit_uniform_floor": fit.floor,
            },
        )
        self.noiser.use(fit.sampler)
        state.cell_density = fit.sampler.cell_density.tolist()


class JudgeSampler:
    """At every validation, the efficiency that the present p(t) has on the losses just validated, beside that of the
    calibration's p(t) and of uniform t. For estimators of one Bernoulli mask, which is what validation measures. Runs
    after Validate."""

    def __init__(
        self,
        calibrator: Calibrator,
        noiser: Noiser,
        artifact: dict[str, Any],
        validation: FixedGridValidation,
        every: int,
        metrics: MetricsLog,
    ) -> None:
        self.calibrator, self.noiser, self.validation = calibrator, noiser, validation
        self.every, self.metrics = every, metrics
        self.first = TabulatedSampler(np.array(artifact["cell_density"]))

    def after_step(self, state: TrainState, _: StepResult) -> None:
        if state.step % self.every == 0:
            self._judge(state)

    def after_run(self, _: TrainState) -> None:
        pass

    def _judge(self, state: TrainState) -> None:
        moments, known = self.validation.moments()
        settings = self.calibrator.settings.model_copy(
            update={"estimator": "token_moments", "target": "second_moment", "density": "token_moments"}
        )
        judge = Calibrator(settings, known, self.calibrator.seed)
        sums = MomentSums.of(moments, settings.num_times)
        present = judge.judge(sums, self.noiser.sampler)
        values = {
            "validation_efficiency": present.of_sampler,
            "validation_efficiency_without_refit": judge.judge(sums, self.first).of_sampler,
            "validation_efficiency_of_uniform": present.of_uniform,
        }
        self.metrics.write(state.step, values)
