"""From a configuration to a finished run: what is built, in which order, and what it leaves in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.base import pinned
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.load import restored_engine
from megatron_mdm.checkpoint.native import keep_companions
from megatron_mdm.checkpoint.store import CheckpointStore
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
from megatron_mdm.engine.base import Engine
from megatron_mdm.models.attention import note_on_varlen
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.collectives import barrier
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.reports.plots import calibration_figure, save_figure, training_figure
from megatron_mdm.training.build import SUPERVISED, build_callbacks
from megatron_mdm.training.calibrate import calibrate, load_artifact, save_artifact
from megatron_mdm.training.callbacks.log import Log
from megatron_mdm.training.faults import FAULTS
from megatron_mdm.training.folder import CALIBRATION, CHECKPOINTS, Start, StartMode, newest, prepare_folder
from megatron_mdm.training.inputs import RunData, total_steps
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import MetricsLog, truncate_records
from megatron_mdm.training.parts import Run, RunParts
from megatron_mdm.training.preflight import preflight
from megatron_mdm.training.rewind import rewind
from megatron_mdm.training.signals import StopOnSignal
from megatron_mdm.training.speed import Speed, job_peak_flops
from megatron_mdm.training.summary import summarize


def train_run(
    config: RunConfig, data: RunData, context: ParallelContext, mode: StartMode, parts: RunParts = SUPERVISED
) -> dict[str, Any]:
    """Train (or finish training) one run. Collective. Returns the summary that is also written to summary.json.

    parts: the kind of the run.
    """
    folder = Path(config.checkpoint.directory)
    config = pinned(config, mode.resume)
    prepare_folder(folder, config, data, mode, context)
    preflight(config, folder / CHECKPOINTS, context)
    signals = StopOnSignal()  # before long work: what is asked for meanwhile is done after the first step
    store = CheckpointStore(folder / CHECKPOINTS, config.checkpoint, context)
    checkpoint, state, saved = newest(store, config, data, context) if mode.resume else Start.from_scratch()
    if checkpoint is None and config.model.init_from and context.is_main:
        print(InitialWeights(config.model).describe(data.tokenizer.mask_id), flush=True)
        keep_companions(Path(config.model.init_from), folder)
    enter("building the engine")
    engine = restored_engine(checkpoint, config, context, state.num_updates)
    if context.is_main and platform.is_cuda() and (note := note_on_varlen()):
        print(f"attention: {note}", flush=True)
    artifact = calibration_of_run(folder, engine, config, data, context)
    metrics = MetricsLog(folder, config.logging.tensorboard, context.is_main, state.step)
    if artifact:
        metrics.figure("calibration", calibration_figure(artifact), state.step)
    if context.is_main:
        truncate_records(folder / FAULTS, state.step)
    peak = job_peak_flops(config.precision.dtype, context)
    while True:
        run = Run(config, data, context, engine, artifact, metrics, state.step, state.skipped_batches)
        source = parts.source(run)
        trainer = Trainer(config, context, source, engine, total_steps(config, len(data.train)))
        log = Log(trainer, metrics, state, Speed(config.model, peak))
        callbacks = build_callbacks(run, parts, trainer, store, [log, signals])
        source.load_state_dict(saved.source, saved.arrays)
        callbacks.load_state_dict(saved.callbacks)
        trainer.train(state, callbacks)
        if not state.rewinding:
            break
        state, saved = rewind(state, callbacks, trainer, store, metrics)
    if state.failure:
        raise UserError(state.failure)
    summary = {**summarize(state, log, artifact, source), "peak_flops_per_second": peak}
    if context.is_main:
        write_json(folder / "summary.json", summary)
        records = metrics.records()
        if any("loss" in record for record in records):
            save_figure(training_figure(records), folder / "curves.png", cut=False)
    metrics.close()
    return summary


def calibration_of_run(
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
