"""Mask schedules: the probability with which a token is masked at a mask rate t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class MaskSchedule(Protocol):
    def rate(self, t: Floats) -> Floats:
        """r(t), of any shape, for mask rates t in [0, 1]: the share that rules masking whole numbers aim at. It grows
        from 0 to 1."""
        ...

    def mask_probability(self, t: Floats) -> Floats:
        """p_mask(t), of any shape: r(t), but above 0 everywhere."""
        ...


@dataclass(frozen=True)
class LinearSchedule:
    """LLaDA's: r(t) = t, p_mask(t) = (1 − ε) t + ε (paper, Section 2)."""

    epsilon: float

    def rate(self, t: Floats) -> Floats:
        return t

    def mask_probability(self, t: Floats) -> Floats:
        return (1.0 - self.epsilon) * self.rate(t) + self.epsilon


class CosineSchedule(LinearSchedule):
    """MMaDA's for images, and MaskGIT's: r(t) = sin(π t / 2), p_mask(t) = (1 − ε) r(t) + ε.

    MMaDA's training/utils.py draws cos(π u / 2), u ~ U[0, 1]: the same law, of density 2 / (π √(1 − r²)), mean 2/π. So
    the loss is not LLaDA's bound ∫ g(r) dr of the mean cross-entropy g at rate r, but ∫ 2 / (π √(1 − r²)) g(r) dr.
    """

    def rate(self, t: Floats) -> Floats:
        return np.sin(0.5 * np.pi * t)


# by diffusion.mask_schedule: ε → the schedule
MASK_SCHEDULES: dict[str, Callable[[float], MaskSchedule]] = {"linear": LinearSchedule, "cosine": CosineSchedule}
