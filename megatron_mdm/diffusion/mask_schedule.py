"""The log-linear mask schedule of LLaDA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MaskSchedule:
    """p_mask(t) = (1 − ε) t + ε for a mask rate t in [0, 1] (paper, Section 2)."""

    epsilon: float

    def mask_probability(self, t: Floats) -> Floats:
        return (1.0 - self.epsilon) * t + self.epsilon
