"""Squared norms of single samples' gradients at chosen t: what calibration judges `target: gradient` by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_mdm.batch import ModelInputs
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.collate import collate
from megatron_mdm.diffusion.calibrator import FLOORS, Fit
from megatron_mdm.diffusion.exposure import SampleShapes, average_batch
from megatron_mdm.diffusion.gradient_floor import DRAWN_FROM, GradientFloor, harmless_floor
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.noiser import noise
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, TSampler
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.gradient_norms import gradient_norms
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar
from megatron_mdm.training.inputs import RunData

_STREAM = 3  # of the calibration's random numbers


class GradientDraws(NamedTuple):
    t: Floats  # [n]: at the middles of n strata of the quantile, in random order
    weight: Floats  # [n]: 1/density of t
    squares: Floats  # [n]: ‖G‖², G the gradient of the mean over a sample's rows; ‖G‖ to three digits


def floor_by_gradients(
    fit: Fit, engine: Engine, config: RunConfig, data: RunData, context: ParallelContext
) -> GradientFloor:
    """How much of a fitted density does no harm to the true gradient (diffusion/gradient_floor.py). Collective."""

    def sampler(floor: float) -> TabulatedSampler:
        return fit.with_floor(floor).sampler

    number = config.diffusion.calibration.num_gradients
    return harmless_floor(*draw_gradients(engine, config, data, context, sampler(DRAWN_FROM), number), FLOORS, sampler)


def draw_gradients(
    engine: Engine, config: RunConfig, data: RunData, context: ParallelContext, sampler: TSampler, num_draws: int
) -> GradientDraws:
    """One forward and backward pass for each of num_draws samples. Collective: one rank has the sample, the others of
    its data-parallel group an empty batch."""
    objective = objective_of(config)
    design = objective.design
    normalization = objective.normalization
    shapes = SampleShapes.of(data.train.num_eligible(), data.train.num_delimiters())
    batch_of = average_batch(design, shapes)
    order = stream(config.seed, Purpose.CALIBRATION, _STREAM).permutation(len(data.train))
    strata = stream(config.seed, Purpose.CALIBRATION, _STREAM, 1).permutation(num_draws)
    t, weight = sampler.quantile((strata + 0.5) / num_draws)

    def batches() -> Iterator[list[ModelInputs]]:
        for draw in progress_bar(range(num_draws), desc="gradients", unit="draw", enabled=context.is_main):
            rows = [int(order[draw % len(order)])] if context.data_rank == 0 else []
            clean = collate([data.train.samples[row] for row in rows], rows, rows, data.special_ids.pad)
            generators = [stream(config.seed, Purpose.CALIBRATION, _STREAM, 2 + draw) for _ in rows]
            noised = noise(
                clean,
                t[draw : draw + len(rows)],
                np.ones(len(rows)),
                generators,
                design=design,
                mask_id=data.special_ids.mask,
            )
            weights = normalization(noised, batch_of)
            own = weights._replace(row=weights.row * batch_of.num_samples)  # the sample's own mean
            yield [objective.inputs(noised, own)]

    norms = [float(f"{norm:.3g}") for norm in gradient_norms(engine, batches())]  # layouts differ in the last digits
    return GradientDraws(t, weight, np.square(norms))
