"""From a checkpoint to an engine, on any layout."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_mdm.checkpoint.choice import AUTO, CHOICES, choose_together
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.initial_tokens import contradictions
from megatron_mdm.checkpoint.lazy_tensors import read_elements
from megatron_mdm.checkpoint.manifest import MANIFEST
from megatron_mdm.checkpoint.store import LOSS_SCALE, read_state
from megatron_mdm.checkpoint.tensors import TensorReader
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.config.validate import validate_layout
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mdm.engine.base import Engine, Load
from megatron_mdm.engine.build import build_engine
from megatron_mdm.engine.inference import InferenceEngine, PipelinedInferenceEngine, build_stage
from megatron_mdm.engine.optimizer_state import WEIGHT, Fragment
from megatron_mdm.models.layers import build_model
from megatron_mdm.models.naming import rows_of
from megatron_mdm.parallel.groups import ParallelContext, rank_from_environment, world_size_from_environment

# Keys of a run's data section that may be others when its model is read.
_READING_KEYS = ("tokenizer", "template", "template_date", "mask_token", "pad_token", "eos_token", "end_tokens")


def data_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """key=value arguments of a program that reads a run: (those of its data section, the others).

    Raises UserError naming a key of the section that says nothing about reading.
    """
    ours = [argument for argument in arguments if argument.startswith("data.")]
    for argument in ours:
        key = argument.partition("=")[0]
        if key.removeprefix("data.") not in _READING_KEYS:
            raise UserError(f"'{key}' cannot be set here; of 'data', only {', '.join(_READING_KEYS)} can")
    return ours, [argument for argument in arguments if argument not in ours]


def run_tokenizer(folder: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer of a run; the main rank tells where the Hugging Face files in its folder contradict it."""
    tokenizer = load_tokenizer(config.data)
    for line in contradictions(folder, tokenizer) if rank_from_environment() == 0 else ():
        print(line, file=sys.stderr, flush=True)
    return tokenizer


def add_run_arguments(parser: ArgumentParser) -> None:
    """Which run a program reads, which of its checkpoints, and on which layout."""
    parser.add_argument("--run-dir", required=True, type=Path, help="a run's folder (checkpoint.directory)")
    parser.add_argument("--checkpoint", default=AUTO, help=CHOICES)
    parser.add_argument("--tensor", type=int, default=0, help="tensor-parallel degree; 0: the run's")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel degree")


def run_config(folder: Path, tensor: int = 0, pipeline: int = 1, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved configuration of a run, for reading its model, on a layout of its own.

    tensor: another tensor-parallel degree than it was trained with; 0: the same. overrides: see data_overrides. Raises
    UserError where the ranks that were started do not form the layout.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run's folder (it has no config.yaml)")
    config = load_config(path, overrides)
    parallel = {"pipeline": pipeline, "tensor": tensor or config.parallel.tensor, "sequence": False}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    validate_layout(config, world_size_from_environment())
    return config


def restored_engine(checkpoint: Path | None, config: RunConfig, context: ParallelContext, steps: int) -> Engine:
    """A training engine with a checkpoint's weights, moments and step count; None: initial weights.

    Collective. Initial weights are random, or those that model.init_from names; so are those beside adapters.
    """
    model = config.model
    load: Load | None = _read_afterwards
    if checkpoint is None or model.lora.rank:  # whose checkpoints hold the adapters only
        load = partial(InitialWeights(model).load, context=context, seed=config.seed) if model.init_from else None
    engine = build_engine(config, context, load)
    if checkpoint is None:
        return engine
    restore(engine, checkpoint, config.model, context, steps)
    return engine


def restore(engine: Engine, checkpoint: Path, model: ModelConfig, context: ParallelContext, steps: int) -> None:
    """Give an engine a checkpoint's weights, moments, count of optimizer steps and loss scale. Collective.

    Each rank reads what it holds: of what ZeRO partitions, its part of the fp32 weights and of the moments, from which
    the data-parallel ranks gather the weights that the model computes with.
    """
    reader = TensorReader.of(checkpoint, model)

    def read(part: Fragment) -> Tensor:
        shard = reader.shard(part.name, part.kind, context.tensor_rank, context.layout.tensor)
        return read_elements(shard, part.start, len(part.values), torch.float32)

    engine.optimizer_state.load(read)
    engine.optimizer_state.set_steps(steps)
    engine.loss_scale.load(read_state(checkpoint).get(LOSS_SCALE, {}))


def load_for_inference(
    folder: Path, config: RunConfig, context: ParallelContext, wish: str = AUTO
) -> InferenceEngine | PipelinedInferenceEngine:
    """The model of a run's checkpoint (choice.py says what wishes there are): whole on every data-parallel rank, or on
    every pipeline's ranks. Says in a line which it is."""
    choice = choose_together(folder, wish, context)
    if context.is_main:
        print(f"weights: {choice}", flush=True)
    checkpoint = choice.path
    reader = TensorReader.of(checkpoint, config.model)
    dtype = config.precision.dtype
    if context.layout.pipeline > 1:
        stages = build_stage(config.model, config.parallel, context, None, config.data.max_length)
        read_weights(stages, reader, config.model, context)
        return PipelinedInferenceEngine(stages, config.model, dtype, context, checkpoint.name)
    model = build_model(config.model, config.parallel, context, None)
    read_weights(model, reader, config.model, context)
    return InferenceEngine(model, dtype, checkpoint.name)


def checkpoint_identity(folder: Path, name: str) -> dict[str, str]:
    """JSON-able: a checkpoint's name, and what tells it from another run's of that name."""
    return {"checkpoint": name, "checkpoint's manifest (sha256)": sha256(folder / "checkpoints" / name / MANIFEST)}


def _read_afterwards(_: nn.Module) -> None:
    """Leave an engine's weights unset: they are read once it has been built, together with its moments."""


def read_weights(module: nn.Module, reader: TensorReader, model: ModelConfig, context: ParallelContext) -> None:
    """Fill this rank's parameters from a checkpoint of any layout."""
    for row, tensor in rows_of(module, model):
        value = reader.read(row.name, WEIGHT, context.tensor_rank, context.layout.tensor)
        with torch.no_grad():
            tensor.copy_(value)
