"""A run's parts put together, each on its own: the source of its batches, the trainer, its callbacks."""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron_mdm.training.callbacks.preview import Preview
from megatron_mdm.training.callbacks.save import Save
from megatron_mdm.training.callbacks.validate import Validate
from megatron_mdm.training.faults import Faults
from megatron_mdm.training.inputs import RunData, total_steps
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.parts import Run, RunParts
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


class Supervised:
    """Samples with their targets, or a corpus: the RunParts of every run without a section `rl`."""

    def checked(self, config: RunConfig, world_size: int) -> RunConfig:
        return config

    def check_data(self, config: RunConfig, data: RunData) -> None:
        pass

    def source(self, run: Run) -> SupervisedSource:
        return build_source(run.config, run.data, run.artifact, run.context, run.first_batch)

    def callbacks(self, run: Run, trainer: Trainer) -> list[Callback]:
        """Those that the configuration asks for."""
        config, data, artifact, metrics = run.config, run.data, run.artifact, run.metrics
        source = cast(SupervisedSource, trainer.source)
        noiser = cast(Noiser, source.noise)  # of an objective with a mask design, which the settings below are about
        found: list[Callback] = []
        if artifact and config.diffusion.calibration.refit_every:
            found.append(Refit(calibrator_of(config, as_trained(config, data)), noiser, artifact, metrics))
        if config.evaluation.every and data.validation is not None:
            validation = source.objective.validation(data.validation, data.special_ids, trainer.context)
            found.append(Validate(config.evaluation.every, config.evaluation.patience, validation, trainer, metrics))
            kinds = (config.diffusion.rows_per_sample, config.diffusion.masking, config.diffusion.mask_schedule)
            if artifact and kinds == (1, "bernoulli", "linear") and isinstance(validation, FixedGridValidation):
                found.append(JudgeSampler(noiser, artifact, validation, config.evaluation.every, metrics))
            if config.diffusion.t_sampler == "clipped" and config.diffusion.clipping.bounds == "adaptive":
                found.append(AdaptiveClipping(config, cast(FixedGridValidation, validation), noiser, metrics))
        if config.image.preview:
            found.append(Preview(config, data.tokenizer, trainer.engine, trainer.context, metrics))
        return found


SUPERVISED = Supervised()


def build_callbacks(
    run: Run, parts: RunParts, trainer: Trainer, store: CheckpointStore, others: Sequence[Callback]
) -> Callbacks:
    """The callbacks of every run, of its kind, and others."""
    callbacks = Callbacks()
    of_every_run = (Faults(trainer, run.metrics, run.folder), CompareRanks(trainer, run.metrics, run.folder))
    for callback in (*of_every_run, *others, *parts.callbacks(run, trainer)):
        callbacks.add(callback)
    callbacks.add(Save(trainer, store, run.metrics, run.data.train.fingerprint, callbacks))
    return callbacks
