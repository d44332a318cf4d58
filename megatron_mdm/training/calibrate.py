"""The P-POTS pre-pass: losses at chosen t, sharded over data-parallel ranks, and the density fitted to them.

The result does not depend on the layout: micro-batches are cut once, dealt out to the ranks, their losses collected.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.loader import TrainLoader
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.calibrator import LOWER_QUANTILE, Calibrator, Fit
from megatron_mdm.diffusion.exposure import SampleShapes, exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.moments import MomentSums, group_moments, nested_masking_variance
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler
from megatron_mdm.engine.base import Forward
from megatron_mdm.evaluation.losses import LossMeasurement
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.reports.plots import calibration_figure, save_figure
from megatron_mdm.training.inputs import RunData

ARTIFACT_VERSION = 2
_GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its multiples fill [0, 1] evenly, however many are taken


def calibrate(engine: Forward, config: RunConfig, data: RunData, context: ParallelContext) -> dict[str, Any]:
    """Measure, fit, and return the calibration artifact: JSON-able, the same on every rank. Collective."""
    began = time.monotonic()
    data = replace(data, train=as_trained(config, data))
    prepass = Prepass(engine, config, data, context)
    calibrator = calibrator_of(config, data.train)
    nested = config.diffusion.calibration.estimator == "naive"
    fit, rounds = (_nested if nested else measure_adaptively)(prepass, calibrator)
    artifact = _artifact(fit, rounds, calibrator, config)
    artifact["data_fingerprint"] = data.train.fingerprint
    artifact["seconds"] = round(time.monotonic() - began, 3)
    return artifact


def as_trained(config: RunConfig, data: RunData) -> SftDataset:
    """The training samples with the eos padding that is learnt behind them, if any."""
    if not config.data.eos_padding:
        return data.train
    padding = data.tokenizer.eos_id
    loader = TrainLoader(
        data.train,
        batch=config.batch,
        views=config.diffusion.rows_per_sample,
        data_rank=0,
        data_size=1,
        pad_id=data.tokenizer.pad_id,
        seed=config.seed,
        eos_padding=padding,
    )
    return data.train.with_samples(loader.padded_samples())


def calibrator_of(config: RunConfig, data: SftDataset) -> Calibrator:
    """The way from moments to a density for the estimator that a run trains with."""
    diffusion = config.diffusion
    shapes = SampleShapes.of(data.num_eligible(), data.num_delimiters())
    known = exposures(MaskDesign.of(diffusion), shapes, NORMALIZATIONS[diffusion.normalization])
    return Calibrator(diffusion.calibration, known, config.seed)


@dataclass
class Prepass:
    """Groups measured so far."""

    engine: Forward
    config: RunConfig
    data: RunData
    context: ParallelContext
    moments: list[Floats] = field(default_factory=list)  # of the groups of each round

    @property
    def views(self) -> int:
        return self.config.diffusion.rows_per_sample

    @property
    def num_groups(self) -> int:
        return sum(map(len, self.moments))

    @property
    def budget(self) -> int:
        """Groups whose rows are the paper's a·b·c."""
        settings = self.config.diffusion.calibration
        return max(2, settings.num_samples * settings.num_times * settings.num_masks // self.views)

    def add(self, samples: np.ndarray, t: Floats) -> None:
        """Measure groups of sample samples[i] at t[i], each with masks of its own. Collective."""
        enter(f"round {len(self.moments) + 1} of the calibration")
        config, first = self.config, 1 + self.num_groups
        design = MaskDesign.of(config.diffusion)
        measure = LossMeasurement(
            self.data.train,
            design,
            NORMALIZATIONS[config.diffusion.normalization],
            self.data.special_ids,
            config.batch.micro_size * self.views,
            self.context,
        )
        rows = measure(
            self.engine,
            samples,
            t,
            lambda place: stream(config.seed, Purpose.CALIBRATION, 0, first + place),
            row_gradients=config.diffusion.calibration.target == "gradient",
            progress="calibrate",
        )
        self.moments.append(group_moments(t, design.schedule.mask_probability(t), rows))


def measure_adaptively(prepass: Prepass, calibrator: Calibrator) -> tuple[Fit, list[dict[str, float]]]:
    """Rounds that double the groups until the bootstrap's lower bound of the efficiency reaches its target."""
    settings, data = calibrator.settings, prepass.data.train
    total, rounds = min(max(2, settings.initial_forwards // prepass.views), prepass.budget), []
    while True:
        prepass.add(*spread_groups(len(data), range(prepass.num_groups, total), calibrator.seed))
        moments = np.concatenate(prepass.moments)
        fit = calibrator.fit(halves_of(moments, settings.num_times))
        low, high = np.quantile(calibrator.bootstrap(moments, fit), [LOWER_QUANTILE, 1.0 - LOWER_QUANTILE])
        rounds.append({"forwards": total * prepass.views, "lower": float(low), "upper": float(high)})
        if low >= settings.target_efficiency < 1.0 or total >= prepass.budget:
            return fit, rounds
        total = min(2 * total, prepass.budget)


def spread_groups(num_samples: int, places: range, seed: int) -> tuple[np.ndarray, Floats]:
    """(sample, t) of the groups at these places of an endless sequence that spreads over data set and [0, 1]."""
    order, index = stream(seed, Purpose.CALIBRATION).permutation(num_samples), np.array(places)
    return order[index % num_samples], (0.5 + index * _GOLDEN) % 1.0


def _nested(prepass: Prepass, calibrator: Calibrator) -> tuple[Fit, list[dict[str, float]]]:
    """The paper's a samples × b values of t × c masks."""
    settings, data = calibrator.settings, prepass.data.train
    num_samples = min(settings.num_samples, len(data))
    chosen = stream(calibrator.seed, Purpose.CALIBRATION).permutation(len(data))[:num_samples]
    t = (np.arange(settings.num_times) + 1.0) / settings.num_times
    per_sample = np.repeat(t, settings.num_masks)
    prepass.add(np.repeat(chosen, len(per_sample)), np.tile(per_sample, num_samples))
    moments = nested_masking_variance(prepass.moments[0], settings.num_masks)
    half = num_samples // 2 * len(per_sample)  # whole samples in each half
    halves = [MomentSums.of(part, settings.num_times) for part in (moments[:half], moments[half:])]
    fit = calibrator.fit(halves)
    low, high = np.quantile(calibrator.bootstrap(moments, fit), [LOWER_QUANTILE, 1.0 - LOWER_QUANTILE])
    return fit, [{"forwards": len(moments) * prepass.views, "lower": float(low), "upper": float(high)}]


def halves_of(moments: Floats, num_cells: int) -> list[MomentSums]:
    """Every other group in each half."""
    return [MomentSums.of(moments[first::2], num_cells) for first in (0, 1)]


def _artifact(fit: Fit, rounds: list[dict[str, float]], calibrator: Calibrator, config: RunConfig) -> dict[str, Any]:
    settings, curves = calibrator.settings, fit.curves
    if not (np.isfinite(fit.sampler.cell_density).all() and np.isfinite(fit.efficiency.uniform_variance)):
        raise UserError("calibration: the losses are not finite; check the model's weights")
    t = (np.arange(settings.num_times) + 1.0) / settings.num_times
    optimum = fit.optimum(t)
    scale = float(fit.optimum(CENTRES).mean())
    return {
        "version": ARTIFACT_VERSION,
        "settings": settings.model_dump(mode="json", exclude={"artifact"}),
        "method": config.diffusion.model_dump(mode="json", exclude={"calibration", "sampler"}),
        "seed": calibrator.seed,
        "forwards": rounds[-1]["forwards"],
        "rounds": rounds,
        "density": settings.density,
        "parameters": fit.density.parameters,
        "kl_divergence": fit.kl_from_optimum,
        "uniform_floor": fit.floor,
        "efficiency": fit.efficiency.of_sampler,
        "efficiency_interval": [rounds[-1]["lower"], rounds[-1]["upper"]],
        "efficiency_of_uniform": fit.efficiency.of_uniform,
        "minimal_variance": fit.efficiency.minimal_variance,
        "points": {
            "t": t.tolist(),
            "mean_loss": curves.mean_loss(t).tolist(),
            "second_moment": curves.second_moment(t).tolist(),
            "optimal_density": (optimum / scale).tolist(),
        },
        "moments": [half.sums.tolist() for half in fit.halves],
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
