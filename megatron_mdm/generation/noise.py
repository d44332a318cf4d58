"""The chance in a denoising step: uniform numbers for orders and tokens, drawn on the host or where the logits are.

They are a function of (seed, purpose, id of the prompt, step) and the place: neither batches nor layouts change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.diffusion.hashing import DISTANCE, mixed, uniforms
from megatron_mdm.diffusion.randomness import Purpose, stream

# Some of the N masked positions → their uniform numbers [n, V] float64, in (0, 1) or [0, 1), on any device
TokenUniforms = Callable[[slice], Tensor]


class StepNoise(NamedTuple):
    """Of a step's N masked positions, row by row."""

    orders: Tensor  # [N] float64, on the host
    tokens: TokenUniforms


NO_NOISE = StepNoise(torch.empty(0), torch.empty(0).__getitem__)  # where nothing is drawn


class Noise(Protocol):
    """Of the rows of a batch."""

    def __init__(self, seed: int, purpose: Purpose, ids: Sequence[int]) -> None:
        """ids: of the rows' prompts."""

    def at(self, counter: int, masked: Tensor, num_tokens: int, device: torch.device) -> StepNoise:
        """counter: of a block and a step; masked [R, B] bool, of the block, on the host; num_tokens: V, or 0, where
        tokens are not drawn; device: of the logits."""
        ...


class HostNoise:
    """A stream of numpy's for each row and step: first the order of its masked positions, then V numbers for each."""

    def __init__(self, seed: int, purpose: Purpose, ids: Sequence[int]) -> None:
        self.seed = seed
        self.purpose = purpose
        self.ids = ids

    def at(self, counter: int, masked: Tensor, num_tokens: int, device: torch.device) -> StepNoise:
        orders = []
        tokens = []
        for index, num_masked in zip(self.ids, masked.sum(1).tolist(), strict=True):
            generator = stream(self.seed, self.purpose, counter, index)
            orders.append(torch.from_numpy(generator.random(num_masked)))
            if num_tokens:
                tokens.append(torch.from_numpy(generator.random((num_masked, num_tokens))))
        of_tokens = torch.cat(tokens) if tokens else torch.empty(0)
        return StepNoise(torch.cat(orders), of_tokens.__getitem__)


class DeviceNoise:
    """Hashes (diffusion/hashing.py): of a row's key the counter, of that the position in the block, of that the token.
    Nothing of size V is made on the host, and the numbers are the same on every device."""

    def __init__(self, seed: int, purpose: Purpose, ids: Sequence[int]) -> None:
        keys = [stream(seed, purpose, index=index).integers(-(1 << 63), 1 << 63) for index in ids]
        self.keys = torch.from_numpy(np.array(keys, dtype=np.int64))[:, None]  # [R, 1]

    def at(self, counter: int, masked: Tensor, num_tokens: int, device: torch.device) -> StepNoise:
        of_step = mixed(self.keys + DISTANCE * torch.tensor(counter))
        keys = mixed(of_step + DISTANCE * torch.arange(masked.shape[1]))[masked]  # [N]
        orders = uniforms(mixed(keys - DISTANCE))  # the number before the first token's
        of_tokens = DISTANCE * torch.arange(num_tokens, device=device)
        there = keys.to(device)[:, None]
        return StepNoise(orders, lambda part: uniforms(mixed(there[part] + of_tokens)))


NOISES: dict[str, type[Noise]] = {"host": HostNoise, "device": DeviceNoise}
