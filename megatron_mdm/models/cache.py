"""Keys and values that later forward passes over the same rows use again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.parallel import platform


class KeyValueCache:
    """Of every layer on this rank, at each of T positions of R rows. A layer's tensors are made as it first writes."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.num_rows, self.width = num_rows, width
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer number → keys, values [T, R, kv heads, D]

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Replace a layer's entries at positions [R, S] by key and value [S, R, kv heads, D]; return its whole
        keys and values [T, R, kv heads, D]. What was never written is zero."""
        if layer not in self._layers:
            shape = (self.width, *key.shape[1:])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        where = (positions.t(), torch.arange(self.num_rows, device=positions.device))
        keys[where], values[where] = key, value
        return keys, values


class Window(NamedTuple):
    """The positions that one forward pass computes; other positions' keys and values are those in the cache."""

    cache: KeyValueCache
    positions: Tensor  # [R, S] int64: the places of a micro-batch's tokens in their rows; any S of them, in any order
    lengths: Tensor  # [R] int64: the first lengths[r] positions of row r may be seen

    def to_device(self) -> Window:
        if not platform.is_cuda():
            return self
        return Window(self.cache, self.positions.to(platform.device()), self.lengths.to(platform.device()))

    def visible(self, causal: bool) -> Tensor:
        """[R, 1, S, T] bool ([R, 1, 1, T] where not causal): True where a query of the window may look."""
        places = torch.arange(self.cache.width, device=self.positions.device)
        visible = places < self.lengths[:, None, None]  # [R, 1, T]
        if causal:
            visible = visible & (places <= self.positions[..., None])  # [R, S, T]
        return visible[:, None]
