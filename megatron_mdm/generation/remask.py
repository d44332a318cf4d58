"""Which candidates of a denoising step are kept; the others stay masked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def low_confidence(probabilities: Tensor, candidates: Tensor, _: Tensor) -> Tensor:
    """LLaDA's rule: confidence is the candidate's softmax probability. [R, m, V], [R, m] → [R, m]."""
    return probabilities.gather(2, candidates[..., None]).squeeze(2)


def random(_: Tensor, __: Tensor, uniforms: Tensor) -> Tensor:
    """A uniform number as confidence: positions are unmasked in random order."""
    return uniforms


# (probabilities [R, m, V] float32, candidates [R, m], uniforms [R, m]) → confidence [R, m]
REMASKING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"low_confidence": low_confidence, "random": random}


def tokens_per_step(num_masked: int, num_steps: int) -> list[int]:
    """How many tokens each step commits: ⌊masked/steps⌋, the first (masked mod steps) steps one more."""
    base, extra = divmod(num_masked, num_steps)
    return [base + (step < extra) for step in range(num_steps)]


def gumbel_argmax(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Candidates: argmax of the logits at temperature 0, else argmax of exp(logits)/(−log u)^T in float64."""
    if temperature == 0.0:
        return logits.argmax(-1)
    noisy = logits.double() - temperature * torch.log(-torch.log(uniforms.double()))
    return noisy.argmax(-1)
