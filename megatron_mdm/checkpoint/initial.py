"""model.init_from: initial weights from a Hugging Face checkpoint or a run, each rank reading its own slice only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_mdm.checkpoint.huggingface import CONFIG, HuggingFaceCheckpoint, is_checkpoint
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, as_matrix, cut, with_grown_tables, with_padding
from megatron_mdm.checkpoint.native import RUN_CONFIG, NativeCheckpoint
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.families.family import ARCHITECTURE
from megatron_mdm.models.initialize import initialize_weights
from megatron_mdm.models.naming import rows_of
from megatron_mdm.models.parameters import parameter_table
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import beat


class InitialWeights:
    """The weights that model.init_from names, as whole tensors of our model, of which nothing has been read yet."""

    def __init__(self, model: ModelConfig) -> None:
        """Raises UserError naming what is damaged, or the key by which the checkpoint's architecture differs."""
        self.model = model
        path = Path(model.init_from)
        if not path.is_dir():
            raise UserError(f"'model.init_from' {path}: no such folder")
        if is_checkpoint(path):
            source = HuggingFaceCheckpoint.open(path, model.ignore_fields)
            tensors = source.lazy_tensors()
            theirs = source.model
            where = path / CONFIG
            self.kind = source.family.architecture
            self.notes = source.notes
        else:
            run = NativeCheckpoint.open(path)
            tensors = run.lazy_tensors()
            theirs = run.config.model
            where = run.folder / RUN_CONFIG
            self.kind = f"run, {run.path.name}, {run.reason}"
            self.notes = ()
        check_same_architecture(model, theirs, where)
        self.rows = theirs.vocab_size
        check_places(model, tensors, path)
        self.tensors = with_grown_tables(tensors, model)

    def load(self, module: nn.Module, context: ParallelContext, seed: int) -> None:
        """Fill the parameters that this rank holds. What the checkpoint lacks, since 'model.extensions' adds it, is
        drawn by the seed."""
        degree = context.layout.tensor
        new = []
        for row, parameter in rows_of(module, self.model):
            beat()
            if row.name not in self.tensors:
                new.append((row, parameter))
                continue
            whole = with_padding(self.tensors[row.name], row, degree)
            assert tuple(whole.shape) == row.padded_shape(degree), (row.name, whole.shape)
            fill(parameter, cut(whole, row.split.get("tensor"), context.tensor_rank, degree))
        initialize_weights(new, self.model, seed, context.tensor_rank, degree)

    def describe(self, mask_id: int) -> str:
        """What was read and where the mask token's row comes from; and a line for each thing that was not read."""
        rows = self.rows
        wanted = int(self.model.vocab_size)
        size = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        text = f"initial weights: {self.model.init_from} ({self.kind}, {size / 1e6:,.1f} M parameters)"
        new_size = sum(row.size for name, row in parameter_table(self.model).items() if name not in self.tensors)
        if new_size:
            text += f"; {new_size / 1e6:,.1f} M that 'model.extensions' adds are drawn"
        if wanted != rows:
            text += f"; the table grew from {rows} to {wanted} rows, the new ones being the mean of the others"
        new = "a new row" if mask_id >= int(rows) else "a row of the checkpoint's table"
        return "\n".join([f"{text}; mask token {mask_id}: {new}", *self.notes])


def check_same_architecture(model: ModelConfig, theirs: ModelConfig, where: Path) -> None:
    """Raise UserError where a run's model section does not describe the checkpoint. The table may grow."""
    for name in ARCHITECTURE:
        field = "kv_channels" if name == "head_dim" else name  # head_dim 0 may stand for the same width
        mine = getattr(model, field)
        other = getattr(theirs, field)
        fits = mine >= other if name == "vocab_size" else mine == other
        if not fits and name != "max_sequence_length":
            raise UserError(f"'model.{name}' is {mine}, but {other} by {where}; set 'model.{name}' to {other}")


def check_places(model: ModelConfig, names: Iterable[str], path: Path) -> None:
    """Raise UserError naming a tensor that the model has no place for: what its run's 'model.extensions' added."""
    for name in names:
        if name not in parameter_table(model):
            raise UserError(f"'model.init_from' {path}: holds '{name}', which the model lacks; see 'model.extensions'")


def fill(parameter: Tensor, tensor: LazyTensor) -> None:
    with torch.no_grad():
        if parameter.device.type == "cpu":
            tensor.read_into(as_matrix(parameter.data), 0, 0)
            return
        values = torch.empty(parameter.shape, dtype=tensor.dtype)
        tensor.read_into(as_matrix(values), 0, 0)
        parameter.copy_(values)
