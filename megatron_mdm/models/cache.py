"""Keys and values that later forward passes over the same rows use again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.parallel import platform


class KeyValueCache:
    """Keys and values of every layer on this rank, at each of T positions of R rows. A layer's tensors are made when it
    first writes."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.num_rows = num_rows
        self.width = width
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer number → keys, values [T, R, kv heads, D]

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Replace a layer's entries at positions [R, S] by key and value [S, R, kv heads, D]; return its whole
        keys and values [T, R, kv heads, D]. What was never written is zero."""
        if layer not in self._layers:
            shape = (self.width, *key.shape[1:])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        where = (positions.t(), torch.arange(self.num_rows, device=positions.device))
        keys[where] = key
        values[where] = value
        return keys, values


class Window(NamedTuple):
    """The positions that one forward pass computes; other positions' keys and values are those in the cache. Which of
    the T positions they see is told by the inputs' attention pattern."""

    cache: KeyValueCache
    positions: Tensor  # [R, S] int64: the places of a micro-batch's tokens in their rows; any S of them, in any order

    def to_device(self) -> Window:
        return Window(self.cache, self.positions.to(platform.device())) if platform.is_cuda() else self
