"""A run's parts put together, each on its own: the source of its batches, the trainer, its callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_mdm.checkpoint.store import CheckpointStore
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.loader import NO_EOS_PADDING, PrefetchLoader, TrainLoader
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.inputs import InputLayout
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.calibrate import as_trained, calibrator_of
from megatron_mdm.training.callbacks.base import Callback, Callbacks
from megatron_mdm.training.callbacks.clipping import AdaptiveClipping
from megatron_mdm.training.callbacks.save import Save
from megatron_mdm.training.callbacks.validate import Validate
from megatron_mdm.training.faults import Faults
from megatron_mdm.training.inputs import RunData, total_steps
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.refit import JudgeSampler, Refit
from megatron_mdm.training.source import SupervisedSource
from megatron_mdm.training.speed import CompareRanks


def build_source(
    config: RunConfig, data: RunData, artifact: dict[str, Any] | None, context: ParallelContext, first_batch: int = 0
) -> SupervisedSource:
    """Training samples, noised as the configuration asks.

    artifact: the calibration, where the sampler needs one. first_batch: the one that step 0 takes, in the data's order.
    """
    cell_density = np.array(artifact["cell_density"]) if artifact else np.empty(0)
    objective = objective_of(config)
    loader = TrainLoader(
        data.train,
        batch=config.batch,
        views=config.diffusion.rows_per_sample,
        data_rank=context.data_rank,
        data_size=context.layout.data,
        pad_id=data.tokenizer.pad_id,
        seed=config.seed,
        eos_padding=data.tokenizer.eos_id if config.data.eos_padding else NO_EOS_PADDING,
        caption_dropout=objective.caption_dropout,
        first=first_batch,
    )
    noise = objective.noise(cell_density, data.tokenizer.mask_id)
    dropout_seed = config.seed if config.model.lora.rank and config.model.lora.dropout else None
    return SupervisedSource(context, PrefetchLoader(loader), objective, noise, layout_ahead(config), dropout_seed)


def layout_ahead(config: RunConfig) -> InputLayout | None:
    """How batches are made ready a step ahead; None on the CPU, where the thread would take the cores that the model
    computes on."""
    return InputLayout.of(config) if platform.is_cuda() else None


def build_trainer(
    config: RunConfig,
    data: RunData,
    engine: Engine,
    artifact: dict[str, Any] | None,
    context: ParallelContext,
    first_batch: int = 0,
) -> Trainer:
    """A trainer with a source of its own; arguments as build_source's."""
    source = build_source(config, data, artifact, context, first_batch)
    return Trainer(config, context, source, engine, total_steps(config, len(data.train)))


def build_callbacks(
    trainer: Trainer,
    source: SupervisedSource,
    data: RunData,
    store: CheckpointStore,
    metrics: MetricsLog,
    artifact: dict[str, Any] | None,
    others: Sequence[Callback],
) -> Callbacks:
    """The callbacks that the configuration asks for, and others."""
    config = trainer.config
    folder = Path(trainer.config.checkpoint.directory)
    callbacks = Callbacks()
    for callback in (Faults(trainer, metrics, folder), CompareRanks(trainer, metrics, folder), *others):
        callbacks.add(callback)
    noiser = cast(Noiser, source.noise)  # of an objective with a mask design, which the settings below are about
    if artifact and config.diffusion.calibration.refit_every:
        callbacks.add(Refit(calibrator_of(config, as_trained(config, data)), noiser, artifact, metrics))
    if config.evaluation.every and data.validation is not None:
        validation = source.objective.validation(data.validation, data.special_ids, trainer.context)
        callbacks.add(Validate(config, validation, trainer, metrics))
        kinds = (config.diffusion.rows_per_sample, config.diffusion.masking, config.diffusion.mask_schedule)
        if artifact and kinds == (1, "bernoulli", "linear") and isinstance(validation, FixedGridValidation):
            callbacks.add(JudgeSampler(noiser, artifact, validation, config.evaluation.every, metrics))
        if config.diffusion.t_sampler == "clipped" and config.diffusion.clipping.bounds == "adaptive":
            callbacks.add(AdaptiveClipping(config, cast(FixedGridValidation, validation), noiser, metrics))
    callbacks.add(Save(trainer, store, metrics, data.train.fingerprint, callbacks))
    return callbacks
