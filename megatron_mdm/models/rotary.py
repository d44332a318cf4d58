"""Rotary positions of queries and keys, in fewer passes over memory than megatron-core's chain of operations.

The same products and sums as megatron/core/models/common/embeddings/rope_utils.py (half-split, as in GPT-NeoX):
(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles by position: [S, 1, 1, D] for all rows alike, or [S, R, 1, D]; D the width of a head."""

    cosine: Tensor
    signed_sine: Tensor  # negative in the first half of D

    @classmethod
    def of(cls, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """angles float32, as megatron-core's RotaryEmbedding gives them: both halves of D alike."""
        sine = angles.sin()
        sine.narrow(-1, 0, sine.shape[-1] // 2).neg_()
        return cls(angles.cos().to(dtype), sine.to(dtype))


def angles_at(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles [S, R, 1, D] float32 of positions [R, S], as megatron-core's RotaryEmbedding gives them for 0 … S−1.
    frequencies [D/2] float32: its inv_freq."""
    half = positions.t()[..., None, None].to(frequencies.dtype) * frequencies.to(positions.device)
    return torch.cat([half, half], dim=-1)


def rotate(x: Tensor, rotation: Rotation, heads_first: bool) -> Tensor:
    """x [S, B, heads, D] → the same, turned. heads_first: in memory the result is [B, heads, S, D], which products over
    positions read fastest."""
    if torch.compiler.is_compiling():  # what fuses the chain, and chooses the memory's order itself
        first, second = x.chunk(2, dim=-1)
        return x * rotation.cosine + torch.cat([second, first], dim=-1) * rotation.signed_sine
    return _Rotate.apply(x, rotation.cosine, rotation.signed_sine, heads_first)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, signed_sine: Tensor, heads_first: bool) -> Tensor:
        ctx.save_for_backward(cosine, signed_sine)
        return _turned(x, cosine, signed_sine, heads_first)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, signed_sine = ctx.saved_tensors
        return _turned(gradient, cosine, signed_sine.neg(), heads_first=False), None, None, None


def _turned(x: Tensor, cosine: Tensor, signed_sine: Tensor, heads_first: bool) -> Tensor:
    length, rows, heads, width = x.shape

    def empty() -> Tensor:  # each of its own: a part of a common memory would keep all of it
        if heads_first:
            return x.new_empty(rows, heads, length, width).permute(2, 0, 1, 3)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    if x.is_cuda:
        return turned_by_halves(x, cosine, signed_sine, empty())
    result, other = empty(), empty()
    first, second = x.chunk(2, dim=-1)
    swapped_first, swapped_second = other.chunk(2, dim=-1)
    swapped_first.copy_(second)
    swapped_second.copy_(first)
    torch.mul(x, cosine, out=result)
    return result.add_(other.mul_(signed_sine))


def turned_by_halves(x: Tensor, cosine: Tensor, signed_sine: Tensor, result: Tensor) -> Tensor:
    """result, [S, B, heads, D] as x, with x turned: half by half, in two passes each and with one rounding of the sums.
    On CUDA passes over memory are what it costs."""
    halves = x.chunk(2, dim=-1)
    for half, other, cos, sin, out in zip(
        halves, reversed(halves), cosine.chunk(2, dim=-1), signed_sine.chunk(2, dim=-1), result.chunk(2, dim=-1)
    ):
        torch.mul(half, cos, out=out)
        out.addcmul_(other, sin)
    return result
