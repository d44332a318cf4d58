"""Mask schedules: the probability with which a token is masked at a mask rate t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class MaskSchedule(Protocol):
    def mask_probability(self, t: Floats) -> Floats:
        """p_mask(t), of any shape, for mask rates t in [0, 1]; it grows with t."""
        ...


@dataclass(frozen=True)
class LinearSchedule:
    """LLaDA's: p_mask(t) = (1 − ε) t + ε (paper, Section 2)."""

    epsilon: float

    def mask_probability(self, t: Floats) -> Floats:
        return (1.0 - self.epsilon) * t + self.epsilon


# by diffusion.mask_schedule: ε → the schedule
MASK_SCHEDULES: dict[str, Callable[[float], MaskSchedule]] = {"linear": LinearSchedule}
