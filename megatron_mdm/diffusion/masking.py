"""Which eligible positions of a sample are masked: one rule, one or two complementary views."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.mask_schedule import Floats, MaskSchedule


class Masking(NamedTuple):
    masked: NDArray[np.bool_]  # [V, P]
    token_weight: Floats  # [V, P]: a masked token's cross-entropy is multiplied by it (1/q)


# (uniforms [P], t, schedule, views) → Masking
MaskingRule = Callable[[Floats, float, MaskSchedule, int], Masking]


def bernoulli(uniforms: Floats, t: float, schedule: MaskSchedule, views: int) -> Masking:
    """Each position is masked independently with probability q = p_mask(t) (paper, Section 2).

    MIRROR (paper, Section 4.2): view 1 masks U < q, view 2 masks U > 1 − q: the same marginal, disjoint for q < 1/2.
    """
    q = schedule.mask_probability(np.full_like(uniforms, t))
    masked = np.stack([uniforms < q, uniforms > 1.0 - q][:views])
    return Masking(masked, np.broadcast_to(1.0 / q, masked.shape))


MASKING_RULES: dict[str, MaskingRule] = {"bernoulli": bernoulli}
