"""After a loss spike: back to the newest checkpoint, and training from there without the batches since."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from megatron_mdm.checkpoint.load import restore
from megatron_mdm.checkpoint.store import CheckpointStore, read_arrays, read_state
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.training.callbacks.base import Callbacks
from megatron_mdm.training.faults import append_fault
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import SavedState, TrainState, restored_state


def rewind(
    state: TrainState, callbacks: Callbacks, trainer: Trainer, store: CheckpointStore, metrics: MetricsLog
) -> tuple[TrainState, SavedState]:
    """The state to resume with, and the parts' states; the engine then has the checkpoint's weights and moments.
    Collective.

    The batches trained on since the checkpoint, the spike's the last of them, are left out for good. Where there is no
    checkpoint yet, the run continues as it is. A stop that was asked for still holds. No save is under way: the
    callback Save has waited for it.
    """
    enter("the way back to the newest checkpoint")
    state.rewinding = False
    checkpoint = store.newest_intact()
    if checkpoint is None:
        _say(store, f"step {state.step}: no checkpoint yet to go back to; training goes on")
        return state, SavedState.of(callbacks, trainer.source)
    before, saved = rewound(state, checkpoint)
    restore(trainer.engine, checkpoint, trainer.config.model, trainer.context, before.num_updates)
    metrics.go_back(before.step)
    first = state.skipped_batches + before.step
    last = state.skipped_batches + state.step - 1
    _say(store, f"step {state.step}: back to {checkpoint.name}; batches {first} to {last} are left out")
    if store.context.is_main:
        record = {"step": state.step, "kind": "rewind", "to_step": before.step, "batches": [first, last]}
        append_fault(Path(trainer.config.checkpoint.directory), record)
    return before, saved


def rewound(state: TrainState, checkpoint: Path) -> tuple[TrainState, SavedState]:
    """A checkpoint's states, less the batches that were trained on since."""
    before, saved = restored_state(read_state(checkpoint), read_arrays(checkpoint))
    before.skipped_batches = state.skipped_batches + state.step - before.step
    before.num_rewinds = state.num_rewinds + 1
    before.stop_reason = state.stop_reason
    before.interrupted = state.interrupted
    return before, saved


def _say(store: CheckpointStore, what: str) -> None:
    if store.context.is_main:
        tqdm.write(f"warning: {what}", file=sys.stderr)
