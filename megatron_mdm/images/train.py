"""Training of small image tokenizers, on one device: reconstruction, commitment and entropy of the bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.images import lfq
from megatron_mdm.images.magvit import HalfConfig, ImageTokenizerConfig
from megatron_mdm.images.pixels import as_model_input, to_uint8
from megatron_mdm.images.tokenizer import ImageTokenizer

_BETAS = (0.9, 0.99)
_WEIGHT_DECAY = 1e-4
_CLIPPING = 1.0  # norm of the gradient
_WARMUP = 50  # steps
_MOST_MULTIPLIER = 4


@dataclass(frozen=True)
class TrainingSettings:
    """Weights are relative to the mean squared error of pixels in [−1, 1]."""

    steps: int
    batch_size: int
    lr: float
    commitment: float
    entropy: float
    seed: int


def small_config(channels: int, halvings: int, blocks: int, bits: int) -> ImageTokenizerConfig:
    """The architecture in a small size: widths double with every halving, up to four times."""
    multipliers = tuple(min(1 << level, _MOST_MULTIPLIER) for level in range(halvings + 1))
    half = HalfConfig(multipliers=multipliers, blocks=(blocks,) * len(multipliers))
    groups = math.gcd(channels // 2, 32) if channels > 1 else 1
    return ImageTokenizerConfig(channels=channels, encoder=half, decoder=half, bits=bits, groups=groups)


class Progress(NamedTuple):
    step: int  # that has been taken, from 1
    error: float  # mean squared error of the batch's pixels
    entropy: float


def train(
    config: ImageTokenizerConfig,
    pixels: Tensor,
    settings: TrainingSettings,
    device: torch.device,
    report: Callable[[Progress], None],
) -> ImageTokenizer:
    """A tokenizer for pictures like these, uint8 [N, R, R, 3]: on the device, in evaluation mode. report is told of
    every step.

    Initial weights and batches follow from the seed. Raises UserError where the loss stops being finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        tokenizer = ImageTokenizer(config).to(device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=settings.lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _lr_factor(step, settings.steps)
        rows = stream(settings.seed, Purpose.DATA_ORDER, step).integers(len(pixels), size=settings.batch_size)
        batch = as_model_input(pixels[torch.from_numpy(rows)].to(device))
        z = tokenizer.encoder(batch)
        error = functional.mse_loss(tokenizer.decoder(lfq.quantize(z)), batch)
        extra = lfq.losses(z)
        loss = error + settings.commitment * extra.commitment + settings.entropy * extra.entropy
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), _CLIPPING)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss of step {step + 1} is not a number; lower --lr (it is {settings.lr:g})")
        optimizer.step()
        report(Progress(step + 1, error.item(), extra.entropy.item()))
    return tokenizer.eval().requires_grad_(False)


def _lr_factor(step: int, steps: int) -> float:
    """A short warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


class Reconstruction(NamedTuple):
    codes: Tensor  # [N, h·w] int64
    pixels: Tensor  # uint8 [N, R, R, 3]


def reconstruct(tokenizer: ImageTokenizer, pixels: Tensor, device: torch.device, batch_size: int) -> Reconstruction:
    """Pictures uint8 [N, R, R, 3] as the tokenizer shows them again, on the CPU."""
    side = pixels.shape[1] // tokenizer.down
    codes, shown = [], []
    for part in pixels.split(batch_size):
        found = tokenizer.encode(as_model_input(part.to(device)))
        codes.append(found.cpu())
        shown.append(to_uint8(tokenizer.decode(found, side, side)).cpu())
    return Reconstruction(torch.cat(codes), torch.cat(shown))


def psnr(left: Tensor, right: Tensor) -> float:
    """Peak signal to noise ratio of uint8 pictures, dB: of the mean squared error over all of them."""
    error = (left.double() - right.double()).square().mean().item()
    return 10.0 * math.log10(255.0**2 / error) if error else math.inf


def code_statistics(codes: Tensor, num_codes: int) -> dict[str, Any]:
    """How many codes are used, and the entropy of their frequencies in bits."""
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    share = counts[counts > 0] / counts.sum()
    return {"used": int((counts > 0).sum()), "of": num_codes, "entropy_bits": float(-(share * share.log2()).sum())}
