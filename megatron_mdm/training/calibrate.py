"""The P-POTS pre-pass: losses at chosen t, sharded over data-parallel ranks, and the density fitted to them.

The result does not depend on the layout: micro-batches are cut once, distributed across ranks, their losses collected.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.loader import NO_EOS_PADDING, TrainLoader
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.data.splits import Dataset
from megatron_mdm.diffusion.calibrator import Calibrator
from megatron_mdm.diffusion.exposure import SampleShapes, exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import group_moments
from megatron_mdm.diffusion.prepass import DESIGNS, Calibration
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler
from megatron_mdm.engine.base import Engine, Forward
from megatron_mdm.evaluation.losses import LossMeasurement
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.reports.plots import calibration_figure, save_figure
from megatron_mdm.training.gradient_draws import floor_by_gradients
from megatron_mdm.training.inputs import RunData

ARTIFACT_VERSION = 3


def calibrate(engine: Engine, config: RunConfig, data: RunData, context: ParallelContext) -> dict[str, Any]:
    """Measure, fit, and return the calibration artifact: JSON-able, the same on every rank. Collective.

    engine: one that only computes losses does where target is not gradient or the floor is given.
    """
    began = time.monotonic()
    data = replace(data, train=as_trained(config, data))
    calibrator = calibrator_of(config, data.train)
    calibration = calibration_of(engine, config, data, context, calibrator)
    choice = None
    if calibrator.settings.is_judged_by_gradients:
        enter("the gradients that judge the calibration")
        choice = floor_by_gradients(calibration.fit, engine, config, data, context)
        calibration = replace(calibration, fit=calibration.fit.with_floor(choice.floor))
        if context.is_main:
            print(f"calibration: {choice.describe()}", flush=True)
    artifact = _artifact(calibration, calibrator, config)
    if choice:
        artifact["gradients"] = choice._asdict()
    artifact["data_fingerprint"] = data.train.fingerprint
    artifact["seconds"] = round(time.monotonic() - began, 3)
    return artifact


def as_trained(config: RunConfig, data: RunData) -> Dataset:
    """The training samples as the first epoch shows them: with the eos padding that is trained on behind them, without
    the captions that it drops."""
    dropout = objective_of(config).caption_dropout
    if not config.data.eos_padding and not dropout:
        return data.train
    loader = TrainLoader(
        data.train,
        batch=config.batch,
        views=config.diffusion.rows_per_sample,
        data_rank=0,
        data_size=1,
        pad_id=data.tokenizer.pad_id,
        seed=config.seed,
        eos_padding=data.tokenizer.eos_id if config.data.eos_padding else NO_EOS_PADDING,
        caption_dropout=dropout,
    )
    return cast(SftDataset, data.train).with_samples(loader.first_epoch())


def calibration_of(
    engine: Forward, config: RunConfig, data: RunData, context: ParallelContext, calibrator: Calibrator
) -> Calibration:
    """A calibration that is measured and fitted as the configuration's estimator asks for. Collective."""
    design = DESIGNS[config.diffusion.calibration.estimator]
    prepass = Prepass(engine, config, data, context)
    return design(prepass.add, calibrator, len(data.train), config.diffusion.rows_per_sample)


def calibrator_of(config: RunConfig, data: Dataset) -> Calibrator:
    """The way from moments to a density for the estimator that a run trains with."""
    shapes = SampleShapes.of(data.num_eligible(), data.num_delimiters())
    objective = objective_of(config)
    known = exposures(objective.design, shapes, objective.normalization)
    return Calibrator(config.diffusion.calibration, known, config.seed)


@dataclass
class Prepass:
    """Measures groups for a calibration; every group has masks of its own."""

    engine: Forward
    config: RunConfig
    data: RunData
    context: ParallelContext
    num_groups: int = 0  # measured so far
    num_rounds: int = 0

    def add(self, samples: np.ndarray, t: Floats) -> Floats:
        """Moments [n, …] of groups of sample samples[i] at t[i]. Collective."""
        config = self.config
        first = 1 + self.num_groups
        self.num_groups += len(samples)
        self.num_rounds += 1
        enter(f"round {self.num_rounds} of the calibration")
        objective = objective_of(config)
        measure = LossMeasurement(
            self.data.train,
            objective.design,
            objective.normalization,
            self.data.special_ids,
            config.batch.micro_size * config.diffusion.rows_per_sample,
            self.context,
            objective.inputs,
        )
        rows = measure(
            self.engine,
            samples,
            t,
            lambda place: stream(config.seed, Purpose.CALIBRATION, 0, first + place),
            row_gradients=config.diffusion.calibration.target == "gradient",
            progress="calibrate",
        )
        return group_moments(t, objective.design.schedule.mask_probability(t), rows)


def _artifact(calibration: Calibration, calibrator: Calibrator, config: RunConfig) -> dict[str, Any]:
    settings = calibrator.settings
    fit = calibration.fit
    last = calibration.rounds[-1]
    judged = calibration.efficiency
    t = (np.arange(settings.num_times) + 1.0) / settings.num_times
    optimum = fit.optimum(t)
    scale = float(fit.optimum(CENTRES).mean())
    return {
        "version": ARTIFACT_VERSION,
        "settings": settings.model_dump(mode="json", exclude={"artifact"}),
        "method": config.diffusion.model_dump(mode="json", exclude={"calibration", "t_sampler"}),
        "seed": calibrator.seed,
        "forwards": last["forwards"],
        "rounds": calibration.rounds,
        "density": settings.density,
        "parameters": fit.density.parameters,
        "kl_divergence": fit.kl_from_optimum,
        "uniform_floor": fit.floor,
        # By losses that the density was not fitted to (diffusion/judge.py); low rather than high.
        "efficiency": judged.of_sampler,
        "efficiency_interval": [last["lower"], last["upper"]],
        "efficiency_of_uniform": judged.of_uniform,
        "minimal_variance": judged.minimal_variance,
        "points": {
            "t": t.tolist(),
            "mean_loss": fit.curves.mean_loss(t).tolist(),
            "second_moment": fit.curves.second_moment(t).tolist(),
            "optimal_density": (optimum / scale).tolist(),
        },
        "moments": [fold.sums.tolist() for fold in fit.folds],
        "cell_density": fit.sampler.cell_density.tolist(),
    }


def save_artifact(artifact: dict[str, Any], path: Path) -> None:
    """Write calibration.json and, beside it, the picture of points and fit."""
    write_json(path, artifact)
    save_figure(calibration_figure(artifact), path.with_suffix(".png"))


def load_artifact(path: Path) -> dict[str, Any]:
    try:
        artifact = json.loads(path.read_text(encoding="utf-8"))
        TabulatedSampler(np.array(artifact["cell_density"], dtype=np.float64))
    except FileNotFoundError:
        raise UserError(f"{path}: no such calibration artifact") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a calibration artifact ({type(error).__name__}: {error})") from None
    if artifact.get("version") != ARTIFACT_VERSION:
        raise UserError(f"{path}: calibration artifact of version {artifact.get('version')}, not {ARTIFACT_VERSION}")
    return artifact
