"""Which candidates of a denoising step are kept, and how many; the others stay masked."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def low_confidence(logits: Tensor, candidates: Tensor, _: Tensor) -> Tensor:
    """LLaDA's rule: confidence is the candidate's softmax probability."""
    return (logits.gather(1, candidates[:, None]).squeeze(1) - logits.logsumexp(1)).exp()


def random(_: Tensor, __: Tensor, uniforms: Tensor) -> Tensor:
    """A uniform number as confidence: positions are unmasked in random order."""
    return uniforms.to(torch.float32)


# (logits [N, V] float32, candidates [N], uniforms [N]) of masked positions → confidence [N] in [0, 1]
REMASKING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"low_confidence": low_confidence, "random": random}


def linear(num_masked: int, num_steps: int) -> list[int]:
    """LLaDA's: ⌊masked/steps⌋ a step, the first (masked mod steps) steps one more."""
    base, extra = divmod(num_masked, num_steps)
    return [base + (step < extra) for step in range(num_steps)]


def cosine(num_masked: int, num_steps: int) -> list[int]:
    """MMaDA's (MaskGIT's): ⌊masked · cos(π/2 · s/steps)⌋ stay masked after step s, but each step that can commits at
    least one: few at first, most at the end."""
    counts, left = [], num_masked
    for step in range(1, num_steps + 1):
        still = math.floor(num_masked * math.cos(math.pi / 2 * step / num_steps) + 1e-9) if step < num_steps else 0
        counts.append(left - max(0, min(still, left - 1)))
        left -= counts[-1]
    return counts


# (masked positions of a block, steps) → how many each step commits
COMMIT_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {"linear": linear, "cosine": cosine}


def gumbel_argmax(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Candidates: argmax of the logits at temperature 0, else argmax of exp(logits)/(−log u)^T in float64."""
    if temperature == 0.0:
        return logits.argmax(-1)
    noisy = logits.double() - temperature * torch.log(-torch.log(uniforms.to(logits.device, torch.float64)))
    return noisy.argmax(-1)
