"""Does the chosen layout compute what the smallest one does? Three steps on both, side by side."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from megatron_mdm.checkpoint.load import restored_engine
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
from megatron_mdm.engine.deepspeed_config import zero_text
from megatron_mdm.objectives import check_run
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext, initialize
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.build import build_trainer
from megatron_mdm.training.calibrate import calibrate
from megatron_mdm.training.dry_run import memory_estimate
from megatron_mdm.training.inputs import RunData

NUM_STEPS = 3
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 1e-2}  # relative, of losses


def check_layout(config: RunConfig, data: RunData, context: ParallelContext) -> None:
    """Print both layouts' losses and their differences. Collective.

    Both use every rank of the job; the smallest splits the model as little as memory allows. Raises UserError where
    losses differ by more than rounding explains.
    """
    if config.rl.is_used:
        raise UserError("--layout-check trains on given answers; for 'rl', compare runs with the same 'rl.replay'")
    reference_config = smallest_layout(config, context.layout.world_size)
    artifact, chosen = _losses(config, data, context, None)
    gc.collect()
    parallel = reference_config.parallel
    reference_context = initialize(parallel)
    _, reference = _losses(reference_config, data, reference_context, artifact)
    tolerance = TOLERANCES[config.precision.dtype]
    differences = [abs(a - b) / abs(b) for a, b in zip(chosen, reference)]
    if context.is_main:
        print(f"chosen layout:   {context.layout}, {zero_text(config)}")
        print(f"smallest layout: {reference_context.layout}, {zero_text(reference_config)}")
        for step, (a, b, difference) in enumerate(zip(chosen, reference, differences)):
            print(f"step {step}: loss {a:.8f}, smallest layout {b:.8f}, relative difference {difference:.1e}")
    if max(differences) > tolerance:
        raise UserError(
            f"layout check: losses differ by {max(differences):.1e}, more than {tolerance:.0e} for "
            f"{config.precision.dtype}; do not train on this layout"
        )
    if context.is_main:
        print(f"layout check passed: differences at most {max(differences):.1e} (limit {tolerance:.0e})", flush=True)


def smallest_layout(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the least tensor and pipeline parallelism whose memory estimate fits this device."""
    for tensor, pipeline in _degrees(config):
        parallel = config.parallel.model_copy(
            update={"tensor": tensor, "pipeline": pipeline, "sequence": config.parallel.sequence and tensor > 1}
        )
        layout = Layout.of(world_size, parallel)
        share, uneven = divmod(config.batch.global_size, layout.data)
        if uneven:
            continue
        micro_size = next(size for size in range(min(config.batch.micro_size, share), 0, -1) if share % size == 0)
        batch = config.batch.model_copy(update={"micro_size": micro_size})
        candidate = config.model_copy(update={"parallel": parallel, "batch": batch})
        if memory_estimate(candidate, layout).total < platform.memory_bytes():
            check_run(candidate, world_size)
            return candidate
    raise UserError("layout check: no layout fits that splits the model less than the chosen one")


def _degrees(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) from 1 × 1 up to the chosen, by their product."""
    chosen = config.parallel
    tensors = [degree for degree in range(1, chosen.tensor + 1) if chosen.tensor % degree == 0]
    pipelines = [degree for degree in range(1, chosen.pipeline + 1) if chosen.pipeline % degree == 0]
    yield from sorted(((t, p) for t in tensors for p in pipelines), key=lambda pair: pair[0] * pair[1])


def _losses(
    config: RunConfig, data: RunData, context: ParallelContext, artifact: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, list[float]]:
    """(calibration, losses of the first steps). Both layouts use the first one's calibration."""
    engine = restored_engine(None, config, context, 0)
    if artifact is None and config.diffusion.t_sampler in CALIBRATED_SAMPLERS:
        quick = {"num_samples": 2, "num_times": 16, "num_masks": 4, "num_restarts": 4}
        calibration = config.diffusion.calibration.model_copy(update=quick)
        diffusion = config.diffusion.model_copy(update={"calibration": calibration})
        artifact = calibrate(engine, config.model_copy(update={"diffusion": diffusion}), data, context)
    trainer = build_trainer(config, data, engine, artifact, context)
    return artifact, [trainer.train_step(step).loss for step in range(NUM_STEPS)]
