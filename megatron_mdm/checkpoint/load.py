"""Open a run's folder for something other than training it."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.checkpoint.store import CheckpointStore
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.inference import InferenceEngine
from megatron_mdm.engine.weights import load_weights
from megatron_mdm.models.stages import build_model
from megatron_mdm.parallel.groups import ParallelContext


def run_config(folder: Path) -> RunConfig:
    """The resolved configuration of a run."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run's folder (it has no config.yaml)")
    return load_config(path)


def load_for_inference(folder: Path, config: RunConfig, context: ParallelContext) -> InferenceEngine:
    """The model of the newest intact checkpoint, on the run's tensor-parallel degree and any number of data ranks."""
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep_last, context)
    checkpoint = store.newest_intact()
    if checkpoint is None:
        raise UserError(f"{folder}: the run has no checkpoint yet")
    model = build_model(config.model, context, config.seed)
    load_weights(model, checkpoint / "weights", context)
    return InferenceEngine(model, config.precision.dtype)
