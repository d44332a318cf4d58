"""A small image tokenizer with random weights."""

from __future__ import annotations

import torch

from megatron_mdm.images.magvit import HalfConfig, ImageTokenizerConfig
from megatron_mdm.images.tokenizer import ImageTokenizer


def small_architecture(bits: int = 5) -> ImageTokenizerConfig:
    encoder = HalfConfig(multipliers=(1, 2), blocks=(1, 2))
    decoder = HalfConfig(multipliers=(2, 1), blocks=(2, 1))
    return ImageTokenizerConfig(channels=8, encoder=encoder, decoder=decoder, bits=bits, groups=4)


def small_image_tokenizer(seed: int = 0, bits: int = 5) -> ImageTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImageTokenizer(small_architecture(bits)).eval().requires_grad_(False)
