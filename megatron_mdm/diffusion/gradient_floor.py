"""Whether a density of t lowers the variance of the true gradient, by gradients of single samples.

`target: gradient` optimises a proxy that knows neither the body's layers nor how the gradients of a sample's tokens
add up, and with long samples or an untrained model it can do harm. Its density is used as far as sampled gradients show
that it does none:

    E_p‖w G‖² − E‖G‖² = ∫ E[‖G‖² | t] (1/p(t) − 1) dt.

They are drawn from the mean of the density and uniform t, and weighted, so that most stand where it matters most. The
mean gradient is the same under every p, so the difference of second moments is that of the variances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import TSampler

UNIFORM = 1.0  # the floor that leaves nothing of the fit
DRAWN_FROM = 0.5  # the floor of the density that gradients are drawn from
_DEVIATIONS = 1.645  # standard errors: a change is taken for one where chance makes it in one case of twenty


class GradientFloor(NamedTuple):
    """The choice, and what it changes: second moments of the weighted gradient over those under uniform t."""

    floor: float  # λ
    ratio: float
    upper: float  # its one-sided 95 % bound; 1 for uniform t
    num_gradients: int

    def describe(self) -> str:
        """One line for a person."""
        by = f"by the gradients of {self.num_gradients} samples"
        if self.floor == UNIFORM:
            return f"t is uniform, since {by} the fitted density does not surely lower their variance"
        return (
            f"{by} p(t) leaves {self.ratio:.3f} of their second moment (at most {self.upper:.3f}), floor {self.floor:g}"
        )


def harmless_floor(
    t: Floats, weight: Floats, squares: Floats, floors: Sequence[float], sampler: Callable[[float], TSampler]
) -> GradientFloor:
    """The floor with the least upper bound of the second moment, uniform t unless another's lies below 1.

    t [n]: drawn with importance weights weight [n]; squares [n]: ‖G‖² of one sample each, the mean over its rows; those
    that are not finite are left out. sampler: of a floor.
    """
    used = np.isfinite(squares)
    t = t[used]
    squares = (weight * squares)[used]
    best = GradientFloor(UNIFORM, 1.0, 1.0, len(t))
    if len(t) < 2 or not squares.any():
        return best
    for floor in floors:
        change = squares * (1.0 / sampler(floor).density(t) - 1.0) / squares.mean()
        ratio = 1.0 + float(change.mean())
        error = float(change.std(ddof=1)) / len(t) ** 0.5
        if ratio + _DEVIATIONS * error < best.upper:
            best = GradientFloor(floor, ratio, ratio + _DEVIATIONS * error, len(t))
    return best
