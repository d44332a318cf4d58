"""model.init_from: initial weights from a Hugging Face checkpoint or a run, each rank reading its own slice only."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from megatron_mdm.checkpoint.huggingface import CONFIG, HuggingFaceCheckpoint, is_checkpoint
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, as_matrix, cut, with_grown_tables, with_rows
from megatron_mdm.checkpoint.native import RUN_CONFIG, NativeCheckpoint
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.engine.optimizer_state import canonical_name
from megatron_mdm.models.families.family import ARCHITECTURE
from megatron_mdm.models.sharding import sharding_of
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import beat


class InitialWeights:
    """The weights that model.init_from names, as whole tensors of our model, of which nothing has been read yet."""

    def __init__(self, model: ModelConfig) -> None:
        """Raises UserError naming what is damaged, or the key by which the checkpoint's architecture differs."""
        self.model, path = model, Path(model.init_from)
        if not path.is_dir():
            raise UserError(f"'model.init_from' {path}: no such folder")
        if is_checkpoint(path):
            source = HuggingFaceCheckpoint.open(path, model.ignore_fields)
            self.views, theirs, where = source.lazy_tensors(), source.model, path / CONFIG
            self.kind, self.notes = source.family.architecture, source.notes
        else:
            run = NativeCheckpoint.open(path)
            self.views, theirs, where = run.lazy_tensors(), run.config.model, run.folder / RUN_CONFIG
            self.kind, self.notes = f"run, {run.path.name}, {run.reason}", ()
        check_same_architecture(model, theirs, where)
        self.rows = theirs.vocab_size
        self.views = with_grown_tables(self.views, model.vocab_size)

    def load(self, module: nn.Module, context: ParallelContext) -> None:
        """Fill the parameters that this rank holds."""
        for name, parameter in module.named_parameters():
            beat()
            source = canonical_name(name, self.model)
            sharding = sharding_of(source)
            view = self.views[source]
            shape = sharding.full_shape(parameter.shape, context.layout.tensor)
            if sharding.is_vocabulary:  # padding depends on the degree
                view = with_rows(view, shape[0])
            assert tuple(view.shape) == tuple(shape), (name, view.shape, shape)
            fill(parameter, cut(view, sharding, context.tensor_rank, context.layout.tensor))

    def describe(self, mask_id: int) -> str:
        """What was read and where the mask token's row comes from; and a line for each thing that was not read."""
        rows, wanted = self.rows, self.model.vocab_size
        size = sum(math.prod(view.shape) for view in self.views.values())
        text = f"initial weights: {self.model.init_from} ({self.kind}, {size / 1e6:,.1f} M parameters)"
        if wanted != rows:
            text += f"; the table grew from {rows} to {wanted} rows, the new ones being the mean of the others"
        new = "a new row" if mask_id >= rows else "a row of the checkpoint's table"
        return "\n".join([f"{text}; mask token {mask_id}: {new}", *self.notes])


def check_same_architecture(model: ModelConfig, theirs: ModelConfig, where: Path) -> None:
    """Raise UserError where a run's model section does not describe the checkpoint. The table may grow."""
    for name in ARCHITECTURE:
        field = "kv_channels" if name == "head_dim" else name  # head_dim 0 may stand for the same width
        mine, other = getattr(model, field), getattr(theirs, field)
        fits = mine >= other if name == "vocab_size" else mine == other
        if not fits and name != "max_sequence_length":
            raise UserError(f"'model.{name}' is {mine}, but {other} by {where}; set 'model.{name}' to {other}")


def fill(parameter: nn.Parameter, view: LazyTensor) -> None:
    with torch.no_grad():
        if parameter.device.type == "cpu":
            view.read_into(as_matrix(parameter.data), 0, 0)
            return
        values = torch.empty(parameter.shape, dtype=view.dtype)
        view.read_into(as_matrix(values), 0, 0)
        parameter.copy_(values)
