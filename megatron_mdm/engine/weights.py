"""Model weights as safetensors, one file per tensor-parallel rank, for everything that needs no optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.groups import ParallelContext


def save_weights(model: torch.nn.Module, directory: Path, context: ParallelContext) -> None:
    """Write this tensor-parallel rank's parameters. Collective: ZeRO 3 shards are gathered one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext():
            if context.data_rank == 0:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if context.data_rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(_file(directory, context)))


def load_weights(model: torch.nn.Module, directory: Path, context: ParallelContext) -> None:
    """Read this tensor-parallel rank's parameters. Raises UserError where the files are for another layout or model."""
    file = _file(directory, context)
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in directory.glob("*.safetensors"))) or "none"
        raise UserError(f"{file}: no such weights (found {found}); use the tensor-parallel degree they were saved with")
    tensors = load_file(str(file))
    parameters = dict(model.named_parameters())
    if tensors.keys() != parameters.keys():
        name = sorted(tensors.keys() ^ parameters.keys())[0]
        raise UserError(f"{file}: weights of another model (parameter '{name}' is on one side only)")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{file}: '{name}' has shape {list(tensors[name].shape)}, not {list(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(tensors[name])


def _file(directory: Path, context: ParallelContext) -> Path:
    return directory / f"tensor-{context.tensor_rank:02d}-of-{context.layout.tensor:02d}.safetensors"
