"""MAGVIT-v2's convolutional encoder and decoder (Yu et al. 2023), with the parameter names of Show-o's and MMaDA's.

Half the width and height at every level but the last; attention in the middle only.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from megatron_mdm.config.sections.section import Section

_NORM_EPS = 1e-6


class HalfConfig(Section):
    """One half's levels, from the pixels' resolution down."""

    multipliers: tuple[int, ...] = Field(min_length=1)  # of the channels
    blocks: tuple[int, ...] = Field(min_length=1)  # residual blocks

    @model_validator(mode="after")
    def _match(self) -> HalfConfig:
        if len(self.multipliers) != len(self.blocks) or min(self.multipliers + self.blocks) < 1:
            raise ValueError("multipliers and blocks must be as many positive numbers")
        return self


class ImageTokenizerConfig(Section):
    """The architecture; without arguments, MMaDA's and Show-o's: 95.4 M parameters, 8,192 codes of 16 × 16 px."""

    channels: int = Field(default=128, gt=0)
    encoder: HalfConfig = HalfConfig(multipliers=(1, 2, 2, 4, 4), blocks=(4, 3, 4, 3, 4))
    decoder: HalfConfig = HalfConfig(multipliers=(1, 1, 2, 2, 4), blocks=(4, 4, 3, 4, 3))
    bits: int = Field(default=13, gt=0, le=24)
    groups: int = Field(default=32, gt=0)  # of the norms

    @model_validator(mode="after")
    def _fits_together(self) -> ImageTokenizerConfig:
        if len(self.encoder.blocks) != len(self.decoder.blocks):
            raise ValueError("encoder and decoder must have as many levels")
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} must be a multiple of groups {self.groups}")
        return self

    @property
    def down(self) -> int:
        """Pixels of a token's side."""
        return 1 << (len(self.encoder.blocks) - 1)

    @property
    def num_codes(self) -> int:
        return 1 << self.bits


class Encoder(nn.Module):
    """Pixels [B, 3, R, R] in [−1, 1] → z [B, bits, R/down, R/down]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.encoder.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            kind(width_in, width, number, config.groups)
            for kind, width_in, width, number in zip(
                [*[_DownLevel] * last, _Level], [config.channels, *widths], widths, config.encoder.blocks
            )
        )
        self.mid = _Middle(widths[last], config.groups)
        self.norm_out = _norm(widths[last], config.groups)
        self.conv_out = nn.Conv2d(widths[last], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        hidden = self.mid(hidden)
        return self.quant_conv(self.conv_out(functional.silu(self.norm_out(hidden))))


class Decoder(nn.Module):
    """Signs [B, bits, h, w] → pixels [B, 3, h·down, w·down], about in [−1, 1]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.decoder.multipliers]
        last = len(widths) - 1
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[last], 3, padding=1)
        self.mid = _Middle(widths[last], config.groups)
        self.up = nn.ModuleList(
            kind(width_in, width, number, config.groups)
            for kind, width_in, width, number in zip(
                [_Level, *[_UpLevel] * last], [*widths[1:], widths[last]], widths, config.decoder.blocks
            )
        )
        self.norm_out = _norm(widths[0], config.groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, signs: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(self.post_quant_conv(signs)))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(functional.silu(self.norm_out(hidden)))


class _Level(nn.Module):
    """Residual blocks, of which the first changes the width."""

    def __init__(self, width_in: int, width: int, num_blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResBlock(width if number else width_in, width, groups) for number in range(num_blocks)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.block:
            hidden = block(hidden)
        return hidden


class _DownLevel(_Level):
    def __init__(self, width_in: int, width: int, num_blocks: int, groups: int) -> None:
        super().__init__(width_in, width, num_blocks, groups)
        self.downsample = _Downsample(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.downsample(super().forward(hidden))


class _UpLevel(_Level):
    def __init__(self, width_in: int, width: int, num_blocks: int, groups: int) -> None:
        super().__init__(width_in, width, num_blocks, groups)
        self.upsample = _Upsample(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.upsample(super().forward(hidden))


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = _ResBlock(width, width, groups)
        self.attn_1 = _Attention(width, groups)
        self.block_2 = _ResBlock(width, width, groups)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class _ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x by a 1 × 1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        change = self.conv1(functional.silu(self.norm1(hidden)))
        change = self.conv2(functional.silu(self.norm2(change)))
        return (self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else hidden) + change


class _Attention(nn.Module):
    """One head over all places, its scale width^−½."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return hidden + self.proj_out(mixed.transpose(1, 2).unflatten(2, hidden.shape[2:]))


class _Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(functional.pad(hidden, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=_NORM_EPS)


def parameter_shapes(config: ImageTokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, without making them."""
    with torch.device("meta"):
        halves = {"encoder": Encoder(config), "decoder": Decoder(config)}
    return {
        f"{half}.{name}": tuple(parameter.shape)
        for half, module in halves.items()
        for name, parameter in module.named_parameters()
    }
