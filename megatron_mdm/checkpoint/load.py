"""From a checkpoint to an engine, on any layout."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_mdm.checkpoint.choice import AUTO, CHOICES, choose_together
from megatron_mdm.checkpoint.initial import InitialWeights, fill
from megatron_mdm.checkpoint.initial_tokens import contradictions
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, cut, read_elements, with_padding
from megatron_mdm.checkpoint.manifest import MANIFEST
from megatron_mdm.checkpoint.merged import merged_names, without_adapters
from megatron_mdm.checkpoint.run_weights import ChosenAdapter, RunWeights
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
from megatron_mdm.engine.optimizer_state import Fragment
from megatron_mdm.models.four_bit import quantize_frozen
from megatron_mdm.models.layers import build_model
from megatron_mdm.models.naming import rows_of
from megatron_mdm.parallel.groups import ParallelContext, rank_from_environment, world_size_from_environment
from megatron_mdm.parallel.heartbeat import beat

# Keys of a run's sections that may be others when its model is read.
_READING_KEYS = {
    "data": ("tokenizer", "template", "template_date", "mask_token", "pad_token", "eos_token", "end_tokens"),
    "image": ("tokenizer", "num_tokens"),
}


class Overrides(NamedTuple):
    """key=value arguments of a program that reads a run."""

    data: list[str]  # of its data section
    base: list[str]  # where the weights beside its adapters are: model.init_from
    others: list[str]
    image: Sequence[str] = ()  # of its image section

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Overrides:
        """Raises UserError naming a key of a section of the run that says nothing about reading."""
        data = _of_section("data", arguments)
        image = _of_section("image", arguments)
        base = [argument for argument in arguments if argument.startswith("model.init_from=")]
        others = [argument for argument in arguments if argument not in (*data, *image, *base)]
        return cls(data, base, others, image)


def _of_section(section: str, arguments: Sequence[str]) -> list[str]:
    known = _READING_KEYS[section]
    ours = [argument for argument in arguments if argument.startswith(f"{section}.")]
    for argument in ours:
        key = argument.partition("=")[0]
        if key.removeprefix(f"{section}.") not in known:
            raise UserError(f"'{key}' cannot be set here; of '{section}', only {', '.join(known)} can")
    return ours


NO_OVERRIDES = Overrides([], [], [])


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


def run_config(folder: Path, tensor: int = 0, pipeline: int = 1, overrides: Overrides = NO_OVERRIDES) -> RunConfig:
    """The resolved configuration of a run, for reading its model, on a layout of its own. The model has no adapters:
    they are merged where it is read.

    tensor: another tensor-parallel degree than it was trained with; 0: the same. Raises UserError where the ranks that
    were started do not form the layout.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run's folder (it has no config.yaml)")
    config = load_config(path, [*overrides.data, *overrides.base, *overrides.image])
    parallel = {"pipeline": pipeline, "tensor": tensor or config.parallel.tensor, "sequence": False}
    config = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "model": without_adapters(config.model),
        }
    )
    validate_layout(config, world_size_from_environment())
    return config


def restored_engine(checkpoint: Path | None, config: RunConfig, context: ParallelContext, steps: int) -> Engine:
    """A training engine with a checkpoint's weights, moments and step count; None: initial weights.

    Collective. Initial weights are random, or those that model.init_from names; so are those beside adapters.
    """
    model = config.model
    load: Load | None = _read_afterwards
    if checkpoint is None or model.lora.rank:  # whose checkpoints hold the adapters only
        initial = InitialWeights(model, with_adapters=checkpoint is None) if model.init_from else None
        load = partial(initial.load, context=context, seed=config.seed) if initial else None
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


class LoadedRun:
    """A run's model for forward passes, which can take one adapter after another."""

    def __init__(
        self, weights: RunWeights, adapter: ChosenAdapter, config: RunConfig, context: ParallelContext
    ) -> None:
        """The model is whole on every data-parallel rank, or on every pipeline's ranks."""
        self.weights = weights
        self.adapter = adapter
        self.context = context
        model = weights.model
        dtype = config.precision.dtype
        name = weights.run.path.name
        self.module: nn.Module
        self.engine: InferenceEngine | PipelinedInferenceEngine
        if context.layout.pipeline > 1:
            self.module = stages = build_stage(model, config.parallel, context, None, config.data.max_length)
            self._read(weights.base)
            self.engine = PipelinedInferenceEngine(stages, model, dtype, context, name)
        else:
            self.module = whole = build_model(model, config.parallel, context, None)
            self._read(weights.base)
            self.engine = InferenceEngine(whole, dtype, name)

    def take(self, adapter: ChosenAdapter) -> None:
        """Read what is not the same with this adapter as with the one before."""
        if adapter is self.adapter:
            return
        model = self.weights.model
        changed = merged_names(self.adapter.weights, model) | merged_names(adapter.weights, model)
        self.adapter = adapter
        self._read(changed)

    def _read(self, names: Collection[str]) -> None:
        tensors = self.weights.tensors(self.adapter)
        merged = merged_names(self.adapter.weights, self.weights.model)
        _fill_rows(self.module, {name: tensors[name] for name in names}, self.weights.model, self.context, merged)


def _fill_rows(
    module: nn.Module,
    tensors: Mapping[str, LazyTensor],
    model: ModelConfig,
    context: ParallelContext,
    merged: Collection[str] = (),
) -> None:
    """Fill this rank's part of the parameters that there are tensors for, by name and whole. merged: those that are
    computed, and rounded to the module's type at once."""
    degree = context.layout.tensor
    for row, parameter in rows_of(module, model):
        if row.name in tensors:
            beat()
            whole = with_padding(tensors[row.name], row, degree)
            shard = cut(whole, row.split.get("tensor"), context.tensor_rank, degree)
            fill(parameter, shard, parameter.dtype if row.name in merged else None)


def load_for_inference(
    folder: Path, config: RunConfig, context: ParallelContext, wish: str = AUTO
) -> InferenceEngine | PipelinedInferenceEngine:
    """The model of a run's checkpoint (choice.py says what wishes there are), with its adapters, if it has some."""
    weights = run_weights(folder, config, context, wish)
    return LoadedRun(weights, weights.adapter(), config, context).engine


def load_for_gradients(folder: Path, config: RunConfig, context: ParallelContext, wish: str = AUTO) -> InferenceEngine:
    """The model of a run's checkpoint on one pipeline stage, as it is trained: with its adapters beside their base, if
    it has some. What is frozen asks for no gradient."""
    weights = run_weights(folder, config, context, wish)
    adapter = weights.adapter().weights
    model = weights.model.model_copy(update={"lora": adapter.lora}) if adapter else weights.model
    whole = build_model(model, config.parallel, context, None)
    _fill_rows(whole, {**weights.base, **(adapter.tensors if adapter else {})}, model, context)
    quantize_frozen(whole, model)
    return InferenceEngine(whole, config.precision.dtype, weights.run.path.name)


def run_weights(
    folder: Path, config: RunConfig, context: ParallelContext, wish: str = AUTO, overrides: Sequence[str] = ()
) -> RunWeights:
    """The weights of a run's checkpoint. Says in a line which it is. Collective. overrides: Overrides.base."""
    choice = choose_together(folder, wish, context)
    if context.is_main:
        print(f"weights: {choice}", flush=True)
    return RunWeights(folder, config.model, choice.path, overrides)


def checkpoint_identity(folder: Path, name: str) -> dict[str, str]:
    """JSON-able: a checkpoint's name, and what tells it from another run's of that name."""
    return {"checkpoint": name, "checkpoint's manifest (sha256)": sha256(folder / "checkpoints" / name / MANIFEST)}


def _read_afterwards(_: nn.Module) -> None:
    """Leave an engine's weights unset: they are read once it has been built, together with its moments."""
