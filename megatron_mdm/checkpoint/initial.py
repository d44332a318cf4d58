"""model.init_from: initial weights from a Hugging Face checkpoint or a run, each rank reading its own slice only."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_mdm.checkpoint.base import fingerprint
from megatron_mdm.checkpoint.chosen_adapters import first_adapters
from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, as_matrix, cut, with_padding
from megatron_mdm.checkpoint.weights import adapter_rows, family_in, fitting_tensors, model_of, opened
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.initialize import initialize_weights
from megatron_mdm.models.naming import rows_of
from megatron_mdm.models.parameters import parameter_table
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import beat


class InitialWeights:
    """The weights that model.init_from names, and the adapters that model.lora.init_from does, as whole tensors of our
    model, of which nothing has been read yet."""

    def __init__(self, model: ModelConfig, with_adapters: bool = True) -> None:
        """with_adapters: false leaves those of model.lora.init_from out, as for a run that has adapters of its own.

        Raises UserError naming what is damaged, or the key by which the checkpoint's architecture differs.
        """
        self.model = model
        path = Path(model.init_from)
        if not path.is_dir():
            raise UserError(f"'model.init_from' {path}: no such folder")
        source = opened(path, model.ignore_fields)
        self.tensors = fitting_tensors(model, source)
        self.rows = model_of(source).vocab_size
        self.notes: tuple[str, ...] = ()
        if isinstance(source, HuggingFaceCheckpoint):
            self.kind = source.family.architecture
            self.notes = source.notes
        else:
            adapted = ", adapters merged" if source.config.model.lora.rank else ""
            self.kind = f"run, {source.path.name}, {source.reason}{adapted}"
        self.begins_with = with_adapters and model.lora.rank > 0 and bool(model.lora.init_from)
        if self.begins_with:
            first = first_adapters(model, family_in(source), self.tensors)
            self.tensors |= first.weights.tensors
            self.notes += first.notes
            if first.base and first.base != fingerprint(path):
                self.notes += (f"{model.lora.init_from}: its adapters were trained beside other weights than {path}",)

    def load(self, module: nn.Module, context: ParallelContext, seed: int) -> None:
        """Fill the parameters that this rank holds. What the checkpoint lacks, since 'model.extensions' or 'model.lora'
        adds it, is drawn by the seed."""
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
        adapters = adapter_rows(self.model)
        size = sum(math.prod(tensor.shape) for name, tensor in self.tensors.items() if name not in adapters)
        text = f"initial weights: {self.model.init_from} ({self.kind}, {size / 1e6:,.1f} M parameters)"
        table = parameter_table(self.model)
        if adapters:
            origin = f"those of {self.model.lora.init_from}" if self.begins_with else "new ones"
            text += f"; adapters: {origin}, {sum(table[name].size for name in adapters) / 1e6:,.1f} M parameters"
        new_size = sum(row.size for name, row in table.items() if name not in self.tensors and name not in adapters)
        if new_size:
            text += f"; {new_size / 1e6:,.1f} M that 'model.extensions' adds are drawn"
        if wanted != rows:
            text += f"; the table grew from {rows} to {wanted} rows, the new ones being the mean of the others"
        new = "a new row" if mask_id >= int(rows) else "a row of the checkpoint's table"
        return "\n".join([f"{text}; mask token {mask_id}: {new}", *self.notes])


def fill(parameter: Tensor, tensor: LazyTensor, dtype: torch.dtype | None = None) -> None:
    """Read a tensor into a parameter of its shape; on the way to a device, in a type of the host; None: its own."""
    with torch.no_grad():
        if parameter.device.type == "cpu":
            tensor.read_into(as_matrix(parameter.data), 0, 0)
            return
        values = torch.empty(parameter.shape, dtype=dtype or tensor.dtype)
        tensor.read_into(as_matrix(values), 0, 0)
        parameter.copy_(values)
