"""Which row of the table of parameters each tensor of a module is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.parameters import Parameter, parameter_table


class Layer(nn.Module):
    """A layer of the pipeline: its parameters have rows in the table, wherever the layer is registered."""

    def table_name(self, own: str) -> str:
        """The table's name of a parameter by its name in the layer, without the names of modules in between."""
        raise NotImplementedError


def rows_of(module: nn.Module, model: ModelConfig) -> Iterator[tuple[Parameter, Tensor]]:
    """(row, parameter or buffer) of everything in a module's layers that has a row, in the order of
    named_parameters(); tied ones once. Raises KeyError naming a parameter without a row."""
    table = parameter_table(model)
    seen = set[int]()
    for layer in (part for part in module.modules() if isinstance(part, Layer)):
        for own, tensor in _tensors(layer, ""):
            row = table.get(layer.table_name(own))
            if row is None and isinstance(tensor, nn.Parameter):
                raise KeyError(f"the table of parameters has no row '{layer.table_name(own)}'")
            if row is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield row, tensor


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; a module that stands around another adds nothing to the other's names."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    wrapped = getattr(module, "wrapped", "")
    for name, child in module.named_children():
        yield from _tensors(child, prefix if name == wrapped else f"{prefix}{name}.")
