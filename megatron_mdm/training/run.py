"""From a configuration to a finished run: what is built, in which order, and what it leaves in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.load import restored_engine
from megatron_mdm.checkpoint.native import HUGGINGFACE, TOKENIZER, keep_companions, keep_tokenizer
from megatron_mdm.checkpoint.store import CheckpointStore, read_state
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically, write_json
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.loader import NO_EOS_PADDING, PrefetchLoader, TrainLoader
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
from megatron_mdm.engine.base import Engine
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel.collectives import barrier, gather_objects, largest
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.parallel.watchdog import HANGS
from megatron_mdm.reports.plots import calibration_figure, save_figure, training_figure
from megatron_mdm.training.calibrate import as_trained, calibrate, calibrator_of, load_artifact, save_artifact
from megatron_mdm.training.callbacks.base import Callback, Callbacks, State
from megatron_mdm.training.callbacks.clipping import AdaptiveClipping
from megatron_mdm.training.callbacks.log import Log
from megatron_mdm.training.callbacks.save import Save
from megatron_mdm.training.callbacks.validate import Validate
from megatron_mdm.training.faults import DUMPS, FAULTS, Faults
from megatron_mdm.training.inputs import RunData, total_steps
from megatron_mdm.training.launches import LAUNCH, launch_id, note_begin
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import MetricsLog, truncate_records
from megatron_mdm.training.preflight import PREFLIGHT, preflight
from megatron_mdm.training.refit import JudgeSampler, Refit
from megatron_mdm.training.resume import INPUTS, check_same_run, contents
from megatron_mdm.training.rewind import rewind
from megatron_mdm.training.signals import StopOnSignal
from megatron_mdm.training.speed import CompareRanks, Speed, job_peak_flops
from megatron_mdm.training.state import TrainState, restored_state
from megatron_mdm.training.summary import summarize

CONFIG, CALIBRATION, CHECKPOINTS = "config.yaml", "calibration.json", "checkpoints"
_ARTIFACTS = (
    *(CONFIG, CALIBRATION, "calibration.png", "metrics.jsonl", "summary.json", "curves.png"),
    *(
        "evaluation.json",
        "samples.jsonl",
        "run.png",
        "run.json",
        HUGGINGFACE,
        TOKENIZER,
        INPUTS,
        FAULTS,
        DUMPS,
        PREFLIGHT,
        HANGS,
        LAUNCH,
    ),
)


@dataclass(frozen=True)
class StartMode:
    """resume: go on where the folder's run stopped; overwrite: remove what it left and start anew."""

    resume: bool = False
    overwrite: bool = False

    @staticmethod
    def agreed(resume: bool, overwrite: bool) -> StartMode:
        """All ranks go on where one is to: a node may have been started anew. Collective."""
        resume = bool(largest(resume))
        return StartMode(resume, overwrite and not resume)


def train_run(config: RunConfig, data: RunData, context: ParallelContext, mode: StartMode) -> dict[str, Any]:
    """Train (or finish training) one run. Collective. Returns the summary that is also written to summary.json."""
    folder = Path(config.checkpoint.directory)
    _prepare_folder(folder, config, data, mode, context)
    preflight(config, folder / CHECKPOINTS, context)
    signals = StopOnSignal()  # before long work: what is asked for meanwhile is done after the first step
    store = CheckpointStore(folder / CHECKPOINTS, config.checkpoint, context)
    checkpoint, state, saved = _newest(store, config, data, context) if mode.resume else _from_scratch()
    if checkpoint is None and config.model.init_from and context.is_main:
        print(InitialWeights(config.model).describe(data.tokenizer.mask_id), flush=True)
        keep_companions(Path(config.model.init_from), folder)
    enter("the making of the engine")
    engine = restored_engine(checkpoint, config, context, state.num_updates)
    artifact = _calibration(folder, engine, config, data, context)
    metrics = MetricsLog(folder, config.logging.tensorboard, context.is_main, state.step)
    if artifact:
        metrics.figure("calibration", calibration_figure(artifact), state.step)
    if context.is_main:
        truncate_records(folder / FAULTS, state.step)
    peak = job_peak_flops(config.precision.dtype, context)
    while True:
        trainer = build_trainer(config, data, engine, artifact, context, state.skipped_batches)
        log = Log(trainer, metrics, state, Speed(config.model, peak))
        callbacks = _callbacks(trainer, data, store, metrics, artifact, [log, signals])
        callbacks.load_state_dict(saved)
        trainer.train(state, callbacks)
        if not state.rewinding:
            break
        state, saved = rewind(state, callbacks, trainer, store, metrics)
    if state.failure:
        raise UserError(state.failure)
    summary = {**summarize(config, state, log, artifact, trainer), "peak_flops_per_second": peak}
    if context.is_main:
        write_json(folder / "summary.json", summary)
        records = metrics.records()
        if any("loss" in record for record in records):
            save_figure(training_figure(records), folder / "curves.png")
    metrics.close()
    return summary


def _prepare_folder(folder: Path, config: RunConfig, data: RunData, mode: StartMode, context: ParallelContext) -> None:
    """Refuse to mix two runs in one folder; write the resolved configuration."""
    used = (folder / "metrics.jsonl").exists() or (folder / CHECKPOINTS).exists()
    if used and not (mode.resume or mode.overwrite):
        raise UserError(f"{folder}: holds a run already; go on with --resume, or start anew with --overwrite")
    if mode.resume and (folder / CONFIG).exists():
        check_same_run(folder, config, data)
    launches = gather_objects(launch_id(), context)  # a barrier, too
    if context.is_main:
        if mode.overwrite:
            tokenizer = Path(config.data.tokenizer).resolve()  # which may be the run's own
            for name in (*_ARTIFACTS, CHECKPOINTS, "tensorboard"):
                path = folder / name
                if not tokenizer.is_relative_to(path.resolve()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        try:
            note_begin(folder, launches)
            section = config.data.model_copy(update={"tokenizer": keep_tokenizer(config.data.tokenizer, folder)})
            write_json(folder / INPUTS, contents(config, data))
            write_atomically(folder / CONFIG, dump_config(config.model_copy(update={"data": section}), folder))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); set 'checkpoint.directory'") from None
    barrier()


Start = tuple[Path | None, TrainState, dict[str, State]]  # checkpoint, training state, callbacks' states


def _from_scratch() -> Start:
    return None, TrainState(), {}


def _newest(store: CheckpointStore, config: RunConfig, data: RunData, context: ParallelContext) -> Start:
    """The checkpoint to resume from, with what it holds."""
    enter("the search for the newest checkpoint")
    checkpoint = store.newest_intact()
    if checkpoint is None:
        if context.is_main:
            print(f"{store.folder}: no checkpoint yet; starting at step 0", flush=True)
        return _from_scratch()
    saved = read_state(checkpoint)
    if "imported_from" in saved:
        raise UserError(
            f"{checkpoint}: imported weights, without an optimizer's state; train in another 'checkpoint.directory' "
            f"with model.init_from={config.checkpoint.directory}"
        )
    if saved["data"] != data.train.fingerprint:
        raise UserError(f"{config.data.train}: the file has changed since {checkpoint} was written")
    state, callbacks = restored_state(saved)
    state.stop_reason, state.failure, state.interrupted = "", "", False
    if context.is_main:
        print(f"resumed from {checkpoint} at step {state.step}", flush=True)
    return checkpoint, state, callbacks


def _calibration(
    folder: Path, engine: Engine, config: RunConfig, data: RunData, context: ParallelContext
) -> dict[str, Any] | None:
    """The artifact in the folder, else the one that is named, else a new one; the folder holds it from then on."""
    diffusion = config.diffusion
    if diffusion.t_sampler not in CALIBRATED_SAMPLERS:
        return None
    if (folder / CALIBRATION).exists():  # of this run, before it was interrupted
        return load_artifact(folder / CALIBRATION)
    if diffusion.calibration.artifact:
        artifact = load_artifact(Path(diffusion.calibration.artifact))
    else:
        artifact = calibrate(engine, config, data, context)
    barrier()  # every rank has looked for the file before it appears
    if context.is_main:
        save_artifact(artifact, folder / CALIBRATION)
    return artifact


def build_trainer(
    config: RunConfig,
    data: RunData,
    engine: Engine,
    artifact: dict[str, Any] | None,
    context: ParallelContext,
    first_batch: int = 0,
) -> Trainer:
    """Loader, noise and engine put together.

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
        first=first_batch,
    )
    noise, num_steps = objective.noise(cell_density, data.tokenizer.mask_id), total_steps(config, len(data.train))
    return Trainer(config, context, PrefetchLoader(loader), objective, noise, engine, num_steps)


def _callbacks(
    trainer: Trainer,
    data: RunData,
    store: CheckpointStore,
    metrics: MetricsLog,
    artifact: dict[str, Any] | None,
    others: Sequence[Callback],
) -> Callbacks:
    """Those that the configuration asks for, and others."""
    config, folder, callbacks = trainer.config, Path(trainer.config.checkpoint.directory), Callbacks()
    for callback in (Faults(trainer, metrics, folder), CompareRanks(trainer, metrics, folder), *others):
        callbacks.add(callback)
    if artifact and config.diffusion.calibration.refit_every:
        callbacks.add(Refit(calibrator_of(config, as_trained(config, data)), trainer.noiser, artifact, metrics))
    if config.evaluation.every and data.validation is not None:
        validation = trainer.objective.validation(data.validation, data.special_ids, trainer.context)
        callbacks.add(Validate(config, validation, trainer, metrics))
        one_mask = config.diffusion.rows_per_sample == 1 and config.diffusion.masking == "bernoulli"
        if artifact and one_mask and isinstance(validation, FixedGridValidation):
            callbacks.add(JudgeSampler(trainer.noiser, artifact, validation, config.evaluation.every, metrics))
        if config.diffusion.t_sampler == "clipped" and config.diffusion.clipping.bounds == "adaptive":
            callbacks.add(AdaptiveClipping(config, validation, trainer.noiser, metrics))
    callbacks.add(Save(trainer, store, metrics, data.train.fingerprint, callbacks))
    return callbacks
