"""MAGVIT-v2's two halves as functions of the public names' weights, from the released classes' description: no modules,
no levels that know how to resize, attention by matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, interpolate, pad

Weights = Mapping[str, Tensor]


def encoded(weights: Weights, blocks: Sequence[int], groups: int, pixels: Tensor) -> Tensor:
    """Pixels → z."""
    x = conv(weights, "encoder.conv_in", pixels, padding=1)
    for level, number in enumerate(blocks):
        for block in range(number):
            x = residual(weights, f"encoder.down.{level}.block.{block}", x, groups)
        if level < len(blocks) - 1:
            x = conv(weights, f"encoder.down.{level}.downsample.conv", pad(x, (0, 1, 0, 1)), stride=2)
    x = middle(weights, "encoder.mid", x, groups)
    x = conv(weights, "encoder.conv_out", swish(norm(weights, "encoder.norm_out", x, groups)), padding=1)
    return conv(weights, "encoder.quant_conv", x)


def decoded(weights: Weights, blocks: Sequence[int], groups: int, signs: Tensor) -> Tensor:
    """Signs → pixels. blocks: of the levels from the pixels' down."""
    x = conv(weights, "decoder.conv_in", conv(weights, "decoder.post_quant_conv", signs), padding=1)
    x = middle(weights, "decoder.mid", x, groups)
    for level in reversed(range(len(blocks))):
        for block in range(blocks[level]):
            x = residual(weights, f"decoder.up.{level}.block.{block}", x, groups)
        if level:
            x = conv(weights, f"decoder.up.{level}.upsample.conv", interpolate(x, scale_factor=2.0), padding=1)
    return conv(weights, "decoder.conv_out", swish(norm(weights, "decoder.norm_out", x, groups)), padding=1)


def middle(weights: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    x = residual(weights, f"{name}.block_1", x, groups)
    normed = norm(weights, f"{name}.attn_1.norm", x, groups)
    query, key, value = (conv(weights, f"{name}.attn_1.{part}", normed).flatten(2) for part in "qkv")  # [B, C, places]
    scores = torch.bmm(query.transpose(1, 2), key) * x.shape[1] ** -0.5
    mixed = torch.bmm(value, scores.softmax(2).transpose(1, 2)).view_as(x)
    return residual(weights, f"{name}.block_2", x + conv(weights, f"{name}.attn_1.proj_out", mixed), groups)


def residual(weights: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    change = conv(weights, f"{name}.conv1", swish(norm(weights, f"{name}.norm1", x, groups)), padding=1)
    change = conv(weights, f"{name}.conv2", swish(norm(weights, f"{name}.norm2", change, groups)), padding=1)
    shortcut = conv(weights, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x
    return shortcut + change


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)


def norm(weights: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    return group_norm(x, groups, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
