"""Initial weights that do not depend on the layout: drawn whole from (seed, parameter name), then cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.models.rows import Parameter
from megatron_mdm.models.sharding import Shape
from megatron_mdm.parallel.heartbeat import beat


def initialize_weights(
    rows: Iterable[tuple[Parameter, Tensor]], config: ModelConfig, seed: int, tensor_rank: int, degree: int
) -> None:
    """Fill tensors with the initial values of their rows.

    With `initialization: sharded` a rank draws its shard alone: fast for large models, but another layout draws others.
    """
    for row, tensor in rows:
        beat()
        law = LAWS[row.initial.law]
        split = row.split.get("tensor")
        with torch.no_grad():
            if config.initialization == "sharded":
                name = f"{row.drawn_by}/{tensor_rank if split else 0}"
                tensor.copy_(law(tuple(tensor.shape), row.initial.std, seed, name))
                continue
            full = law(row.shape, row.initial.std, seed, row.drawn_by)
            if row.is_vocabulary:  # rows of padding are zero: their number depends on the layout
                padded = torch.zeros(row.padded_shape(degree))
                padded[: row.shape[0]] = full
                full = padded
            tensor.copy_(split.shard(full, tensor_rank, degree) if split else full)


def _normal(shape: Shape, std: float, seed: int, name: str) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=_generator(seed, name))


def _uniform(shape: Shape, std: float, seed: int, name: str) -> Tensor:
    bound = std * 3**0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=_generator(seed, name))


def _ones(shape: Shape, *_: object) -> Tensor:
    return torch.ones(shape)


def _zeros(shape: Shape, *_: object) -> Tensor:
    return torch.zeros(shape)


def _generator(seed: int, name: str) -> torch.Generator:
    key = zlib.crc32(name.encode())
    return torch.Generator().manual_seed(int(stream(seed, Purpose.INITIAL_WEIGHTS, index=key).integers(2**63)))


# (shape, standard deviation, seed, name) → fp32 values. Code outside the package can add a law.
LAWS: dict[str, Callable[[Shape, float, int, str], Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "ones": _ones,
    "zeros": _zeros,
}
