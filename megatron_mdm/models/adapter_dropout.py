"""Dropout of what low-rank adapters read, whose masks are a pure function of where they apply.

A mask depends on the run's seed, the step, a sample's place in the global batch, its view, the token's place in the
row, the layer, the linear map and the feature, and on nothing else: every layout, a resumed run and a layer that runs
again in the backward pass have the same one, and no random state is kept. On the host each token gets a key, on the
device key, layer, linear map and feature are hashed (diffusion/hashing.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.batch import ModelInputs
from megatron_mdm.diffusion.hashing import DISTANCE, mixed
from megatron_mdm.diffusion.randomness import Purpose, stream

_LANES = 4  # numbers of 16 bits in a hash: each decides on a feature of its own
_LEVELS = 1 << 16


def with_dropout_keys(inputs: ModelInputs, seed: int, step: int, positions: Tensor) -> ModelInputs:
    """The inputs with a key for each of their tokens [R, S], as an objective gives them: not packed yet, on the host.

    positions: [B] int64, places in the global batch of the samples, of which each has R / B rows, view by view.
    """
    assert not inputs.is_packed, "rows are told apart by the key, and are packed after it has been made"
    num_rows, width = inputs.tokens.shape
    views = num_rows // max(len(positions), 1)
    keys = np.empty((views, len(positions)), dtype=np.int64)
    for column, position in enumerate(positions.tolist()):
        generator = stream(seed, Purpose.ADAPTER_DROPOUT, step, position)
        keys[:, column] = generator.integers(-(1 << 63), 1 << 63, size=views)
    of_rows = torch.from_numpy(keys.reshape(-1, 1))
    return inputs._replace(dropout_keys=mixed(of_rows + DISTANCE * torch.arange(width)))


class AdapterDropout:
    """Of the input of one linear map's adapters: those of a fused matrix read the same one, so they share its mask."""

    def __init__(self, rate: float, layer: int, module: int) -> None:
        """rate: rounded to a multiple of 2⁻¹⁶. module: which of the layer's linear maps."""
        threshold = min(round(rate * _LEVELS), _LEVELS - 1)
        self._below = threshold - _LEVELS // 2  # of the 16 bits as a signed number
        self.kept = 1 - threshold / _LEVELS  # the share of the features that stay, of which they are 1 / kept as large
        self._site = (layer << 8) | module
        self.keys: Tensor | None = None  # [S, R] int64, of the micro-batch that passes; None: nothing is dropped

    def __call__(self, hidden: Tensor, first_position: int, first_feature: int) -> Tensor:
        """hidden [S', R, in] of this rank's positions and features, the first of which are these → the same with
        zeros. The others are left as large as they are: the caller divides by `kept`, where fewer numbers are."""
        assert self.keys is not None
        length, _, width = hidden.shape
        before = first_feature % _LANES
        first = first_feature // _LANES
        hashes = torch.arange(first, first + (before + width + _LANES - 1) // _LANES, device=hidden.device)
        keys = mixed(self.keys[first_position : first_position + length] ^ self._site)
        bits = mixed(keys[..., None] + DISTANCE * hashes).view(torch.int16)
        return hidden.masked_fill(bits[..., before : before + width] < self._below, 0)
