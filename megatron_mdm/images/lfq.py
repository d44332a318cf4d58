"""Look-up free quantization: a token is the signs of K channels (Yu et al. 2023, MAGVIT-v2; there is no codebook).

Channel 0 is the code's most significant bit, as in MMaDA's and Show-o's modeling_magvitv2.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = 1e-6  # probability whose logarithm is taken


def codes(z: Tensor) -> Tensor:
    """z [B, K, h, w] → codes [B, h·w] int64 in raster order: Σ_k [z_k > 0] · 2^(K−1−k)."""
    bits = (z > 0).long()
    place = _places(z.shape[1], z.device)
    return (bits * place[:, None, None]).sum(1).flatten(1)


def vectors(code: Tensor, height: int, width: int, num_bits: int) -> Tensor:
    """Codes [B, h·w] int64 → their signs [B, K, h, w] float32, ±1."""
    bits = (code[:, None, :] & _places(num_bits, code.device)[:, None]) != 0
    return (bits.float() * 2.0 - 1.0).unflatten(2, (height, width))


def quantize(z: Tensor) -> Tensor:
    """The signs of z, 0 counting as −1, whose gradient passes straight through to z."""
    signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
    return z + (signs - z).detach()


class QuantizerLosses(NamedTuple):
    commitment: Tensor  # mean (sign(z) − z)²
    # E[H(bit)] − H(E[bit]) in nats, mean over channels, P(bit = 1) = σ(4 z): sure of each token, unsure of which comes
    entropy: Tensor


def losses(z: Tensor) -> QuantizerLosses:
    """What training adds to the reconstruction's loss, for z [B, K, h, w]; scalars."""
    signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
    logit = 4.0 * z
    probability = torch.sigmoid(logit)
    of_each = functional.softplus(logit) - logit * probability  # whose derivative is finite however sure a bit is
    mean = probability.mean((0, 2, 3)).clamp(_LEAST, 1.0 - _LEAST)
    of_mean = -(mean * mean.log() + (1.0 - mean) * (1.0 - mean).log())
    return QuantizerLosses((signs - z).square().mean(), of_each.mean() - of_mean.mean())


def _places(num_bits: int, device: torch.device) -> Tensor:
    return 1 << torch.arange(num_bits - 1, -1, -1, device=device)
