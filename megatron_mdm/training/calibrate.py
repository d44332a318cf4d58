"""The P-POTS pre-pass: losses on a grid of t, sharded over data-parallel ranks, and the density fitted to them.

The result does not depend on the layout: micro-batches are cut once, dealt out to the ranks, their losses collected.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import CalibrationConfig, DiffusionConfig
from megatron_mdm.data.collate import collate
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.epr import fit_epr
from megatron_mdm.diffusion.mask_schedule import MaskSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES
from megatron_mdm.diffusion.moments import MOMENT_ESTIMATORS, CalibrationSamples, efficiency
from megatron_mdm.diffusion.noiser import NoisedBatch, noise
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import TabulatedSampler
from megatron_mdm.engine.packets import loss_packet
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.models.stages import Packet, RowStatistics
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar
from megatron_mdm.reports.plots import calibration_figure, save_figure

ARTIFACT_VERSION = 1


class Forward(Protocol):
    def evaluate(self, packets: Sequence[Packet]) -> list[RowStatistics]: ...


def calibrate(
    engine: Forward,
    data: SftDataset,
    diffusion: DiffusionConfig,
    special: SpecialIds,
    rows_per_batch: int,
    seed: int,
    context: ParallelContext,
) -> dict[str, Any]:
    """Measure, fit, and return the calibration artifact: JSON-able, the same on every rank. Collective."""
    began = time.monotonic()
    schedule = MaskSchedule(diffusion.epsilon)
    samples = measure(engine, data, diffusion, special, rows_per_batch, seed, context)
    artifact = fit(samples, diffusion.calibration, schedule, seed)
    artifact["data_fingerprint"] = data.fingerprint
    artifact["seconds"] = round(time.monotonic() - began, 3)
    return artifact


def measure(
    engine: Forward,
    data: SftDataset,
    diffusion: DiffusionConfig,
    special: SpecialIds,
    rows_per_batch: int,
    seed: int,
    context: ParallelContext,
) -> CalibrationSamples:
    """Losses of a samples × b values of t × c masks. A micro-batch holds rows of one sample, so nothing is padded."""
    settings = diffusion.calibration
    num_samples = min(settings.num_samples, len(data))
    rows = stream(seed, Purpose.CALIBRATION).permutation(len(data))[:num_samples]
    t = (np.arange(settings.num_times) + 1.0) / settings.num_times
    shape = (num_samples, settings.num_times, settings.num_masks)
    per_sample = settings.num_times * settings.num_masks
    batches = [
        (sample, range(start, min(start + rows_per_batch, per_sample)))
        for sample in range(num_samples)
        for start in range(0, per_sample, rows_per_batch)
    ]
    statistics = np.zeros((4, num_samples, per_sample))
    ranks, together = context.layout.data, 2 * context.layout.pipeline  # packets that fill a pipeline
    turns = range(0, -(-len(batches) // ranks), together)
    for first in progress_bar(turns, desc="calibrate", unit="batch", enabled=context.is_main):
        indices = [(first + turn) * ranks + context.data_rank for turn in range(together)]
        packets = []
        for index in indices:  # ranks without work repeat the last batch, to keep step
            sample, places = batches[min(index, len(batches) - 1)]
            noised = _noise_one_sample(data, rows[sample], sample, places, t, diffusion, special, seed)
            packets.append(loss_packet(noised, NORMALIZATIONS["sample"](noised, GlobalBatch(1, 1))))
        for index, result in zip(indices, engine.evaluate(packets)):
            if index < len(batches):
                sample, places = batches[index]
                statistics[:, sample, places.start : places.stop] = torch.stack(list(result)).double().cpu().numpy()
    loss, ce_sum, ce_square_sum, num_masked = fill_from_data_ranks(statistics, context).reshape(4, *shape)
    return CalibrationSamples(t, data.num_eligible()[rows], loss, ce_sum, ce_square_sum, num_masked)


def fit(samples: CalibrationSamples, settings: CalibrationConfig, schedule: MaskSchedule, seed: int) -> dict[str, Any]:
    """Moments → EPR → the density table that training samples."""
    curves = MOMENT_ESTIMATORS[settings.estimator](samples, schedule, settings.target)
    optimal = curves.optimal_density()
    if not np.isfinite(optimal).all() or optimal.max() <= 0.0:
        raise UserError("calibration: the losses are not finite; check the model's weights")
    epr = fit_epr(curves.t, optimal, num_restarts=settings.num_restarts, seed=seed)
    sampler = TabulatedSampler.of(epr.curve.unnormalized, settings.uniform_floor)
    result = efficiency(curves, sampler)
    return {
        "version": ARTIFACT_VERSION,
        "settings": settings.model_dump(mode="json", exclude={"artifact"}),
        "epsilon": schedule.epsilon,
        "seed": seed,
        "forwards": int(samples.loss.size),
        "epr": epr.curve.parameters(),
        "kl_divergence": epr.kl_divergence,
        "uniform_floor": settings.uniform_floor,
        "efficiency": result.of_sampler,
        "efficiency_of_uniform": result.of_uniform,
        "minimal_variance": result.minimal_variance,
        "points": {
            "t": curves.t.tolist(),
            "mean_loss": curves.mean_loss.tolist(),
            "second_moment": curves.second_moment(curves.t).tolist(),
            "optimal_density": (optimal / optimal.mean()).tolist(),
        },
        "cell_density": sampler.cell_density.tolist(),
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


def _noise_one_sample(
    data: SftDataset,
    row: int,
    sample: int,
    places: range,
    t: np.ndarray,
    diffusion: DiffusionConfig,
    special: SpecialIds,
    seed: int,
) -> NoisedBatch:
    """Rows `places` of one sample's grid, t-major: place = j · c + k."""
    settings = diffusion.calibration
    count = len(places)
    batch = collate([data.samples[row]] * count, range(count), [row] * count, special.pad)
    first = sample * settings.num_times * settings.num_masks
    return noise(
        batch,
        t[np.array(places) // settings.num_masks],
        np.ones(count),
        [stream(seed, Purpose.CALIBRATION, 0, 1 + first + place) for place in places],
        schedule=MaskSchedule(diffusion.epsilon),
        rule=MASKING_RULES[diffusion.masking],
        views=1,
        mask_id=special.mask,
    )
