"""A run's folder: what is in it, how it is made, and the checkpoint in it to resume from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.checkpoint.base import INPUTS
from megatron_mdm.checkpoint.native import HUGGINGFACE, TOKENIZER, keep_tokenizer
from megatron_mdm.checkpoint.store import CheckpointStore, read_arrays, read_state
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically, write_json
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.parallel.collectives import barrier, gather_objects, largest
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.parallel.watchdog import HANGS
from megatron_mdm.training.faults import DUMPS, FAULTS
from megatron_mdm.training.inputs import RunData
from megatron_mdm.training.launches import LAUNCH, launch_id, note_begin
from megatron_mdm.training.preflight import PREFLIGHT
from megatron_mdm.training.resume import check_same_run, contents
from megatron_mdm.training.state import SavedState, TrainState, restored_state

CONFIG = "config.yaml"
CALIBRATION = "calibration.json"
CHECKPOINTS = "checkpoints"
_ARTIFACTS = (  # patterns of what --overwrite removes, beside the checkpoints and tensorboard's files
    CONFIG,
    CALIBRATION,
    "calibration.png",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "evaluation*.json",  # of several adapters a file each
    "perplexity*.json",
    "multiple_choice*.json*",
    "harness*.json*",
    "clip_score*.json*",
    "image_scores*.json*",
    "images*/[0-9][0-9][0-9][0-9][0-9][0-9].png",  # generated for scores
    "images*/sheet.png",
    "samples*.jsonl",
    "rollouts/[0-9][0-9][0-9][0-9][0-9][0-9].npz",
    "rollouts/samples.jsonl",
    "samples/step-*.png",  # previews
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
)


@dataclass(frozen=True)
class StartMode:
    """How a run starts in its folder. resume: where the folder's run stopped; overwrite: remove what it left and train
    from scratch."""

    resume: bool = False
    overwrite: bool = False

    @staticmethod
    def agreed(resume: bool, overwrite: bool) -> StartMode:
        """All ranks resume where one is to: a node may have been restarted. Collective."""
        resume = bool(largest(resume))
        return StartMode(resume, overwrite and not resume)


def prepare_folder(folder: Path, config: RunConfig, data: RunData, mode: StartMode, context: ParallelContext) -> None:
    """Refuse to mix two runs in one folder; write the resolved configuration."""
    used = (folder / "metrics.jsonl").exists() or (folder / CHECKPOINTS).exists()
    if used and not (mode.resume or mode.overwrite):
        raise UserError(
            f"{folder}: holds a run already; resume it with --resume, or start from scratch with --overwrite"
        )
    if mode.resume and (folder / CONFIG).exists():
        check_same_run(folder, config, data)
    launches = gather_objects(launch_id(), context)  # a barrier, too
    if context.is_main:
        if mode.overwrite:
            tokenizer = Path(config.data.tokenizer).resolve()  # which may be the run's own
            patterns = (*_ARTIFACTS, CHECKPOINTS, "tensorboard")
            for path in [path for pattern in patterns for path in folder.glob(pattern)]:
                if tokenizer.is_relative_to(path.resolve()):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        try:
            note_begin(folder, launches)
            section = config.data.model_copy(update={"tokenizer": keep_tokenizer(config.data.tokenizer, folder)})
            write_json(folder / INPUTS, contents(config, data))
            write_atomically(folder / CONFIG, dump_config(config.model_copy(update={"data": section}), folder))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); set 'checkpoint.directory'") from None
    barrier()


class Start(NamedTuple):
    """What a run begins with."""

    checkpoint: Path | None  # none: from scratch, or the weights that model.init_from names
    state: TrainState
    saved: SavedState  # of the callbacks and the source

    @classmethod
    def from_scratch(cls) -> Start:
        return cls(None, TrainState(), SavedState({}, {}, {}))


def newest(store: CheckpointStore, config: RunConfig, data: RunData, context: ParallelContext) -> Start:
    """The checkpoint to resume from, with what it holds."""
    enter("the search for the newest checkpoint")
    checkpoint = store.newest_intact()
    if checkpoint is None:
        if context.is_main:
            print(f"{store.folder}: no checkpoint yet; starting at step 0", flush=True)
        return Start.from_scratch()
    saved = read_state(checkpoint)
    if "imported_from" in saved:
        raise UserError(
            f"{checkpoint}: imported weights, without an optimizer's state; train in another 'checkpoint.directory' "
            f"with model.init_from={config.checkpoint.directory}"
        )
    if saved["data"] != data.train.fingerprint:
        raise UserError(f"{config.data.train}: the file has changed since {checkpoint} was written")
    state, parts = restored_state(saved, read_arrays(checkpoint))
    state.stop_reason = ""
    state.failure = ""
    state.interrupted = False
    if context.is_main:
        print(f"resumed from {checkpoint} at step {state.step}", flush=True)
    return Start(checkpoint, state, parts)
