"""Bin-wise exponential moving averages as a control variate of the *reported* loss (paper, Section 4.4).

What is subtracted is a constant to the gradient, so **training is exactly that of the standard method**; only the loss
that is reported, and its variance, change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.mask_schedule import Floats

_RIDGE = 1e-6


class WeightedLosses(NamedTuple):
    """A global batch's losses, [n] each; loss reported: the mean of weight · loss."""

    t: Floats
    weight: Floats  # w = 1/p(t)
    loss: Floats  # l
    # [m]: E[w 1(t in bin)] of m equal bins of t, under the density that drew t (TSampler.weighted_mass)
    mass: Floats


class ControlVariate(Protocol):
    """State: JSON-able fields; type(x)(**x.state()) restores it."""

    def adjusted(self, batch: WeightedLosses) -> Floats:
        """The terms [n] whose mean is the adjusted loss, by the averages of earlier batches."""
        ...

    def update(self, batch: WeightedLosses) -> None:
        """Move the averages towards this batch's; after adjusted, whose expectation needs them to be independent."""
        ...

    def state(self) -> dict[str, Any]: ...


@dataclass
class CentredVariate:
    """w·l − c (w β(t) − E[w β(t)]): β is the running mean loss of t's bin, less what it is on average over the density
    that drew t, so the adjusted loss keeps its mean; c = Cov / Var of earlier batches makes its variance least.

    The expectation Σ_bins β · mass is exact for every sampler of t, and for strata too, since each t has the sampler's
    density. Averages are ratios of exponentially forgotten sums, so that they have no start to forget and few losses
    weigh little; losses weigh w² in them, which leaves w·l the least variance.
    """

    rate: float
    weighted_loss: list[float]  # [m]: Σ w² l
    weight: list[float]  # [m]: Σ w²
    covariance: float = 0.0  # of w·l and the centred variate
    variance: float = 0.0  # of the centred variate

    @classmethod
    def new(cls, num_bins: int, rate: float) -> CentredVariate:
        return cls(rate, [0.0] * num_bins, [0.0] * num_bins)

    def adjusted(self, batch: WeightedLosses) -> Floats:
        coefficient = self.covariance / self.variance if self.variance > 0.0 else 0.0
        return batch.weight * batch.loss - coefficient * self._deviation(batch)

    def update(self, batch: WeightedLosses) -> None:
        deviation = self._deviation(batch)
        term = batch.weight * batch.loss
        centred = deviation - deviation.mean()
        self.covariance += self.rate * (float((term * centred).mean()) - self.covariance)
        self.variance += self.rate * (float((centred**2).mean()) - self.variance)
        bins = bins_of(batch.t, len(self.weight))
        square = batch.weight**2
        num_bins = len(self.weight)
        for sums, values in ((self.weighted_loss, square * batch.loss), (self.weight, square)):
            new = np.bincount(bins, values, num_bins)
            sums[:] = ((1.0 - self.rate) * np.array(sums) + self.rate * new).tolist()

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def _deviation(self, batch: WeightedLosses) -> Floats:
        """w β(t) − E[w β(t)], [n]; a bin that has seen nothing has the others' mean."""
        loss = np.array(self.weighted_loss)
        weight = np.array(self.weight)
        if not weight.any():
            return np.zeros_like(batch.loss)
        mean = np.where(weight > 0.0, loss / np.maximum(weight, 1e-300), loss.sum() / weight.sum())
        return batch.weight * mean[bins_of(batch.t, len(mean))] - float(batch.mass @ mean)


@dataclass
class PaperVariate:
    """w (l − c·b), c = Cov(l, b) / Var(b) over time with the baseline b of t's bin, as in the paper: c·b is not
    centred, so the adjusted loss has another mean, which c's own noise moves about.

    State: [m] each; rate is α. Rules of thumb (paper): m ∝ N^(1/5) and m · batch / α ≈ 0.1 · |training set|.
    """

    rate: float
    loss: list[float]  # μ_L
    baseline_mean: list[float]  # μ_H
    product: list[float]  # M_LH
    square: list[float]  # M_HH
    baseline: list[float]  # b

    @classmethod
    def new(cls, num_bins: int, rate: float) -> PaperVariate:
        return cls(rate, *([0.0] * num_bins for _ in range(5)))

    def adjusted(self, batch: WeightedLosses) -> Floats:
        mean, baseline_mean, product, square, baseline = self._arrays()
        c = (product - mean * baseline_mean) / (square - baseline_mean**2 + _RIDGE)
        return batch.weight * (batch.loss - (c * baseline)[bins_of(batch.t, len(c))])

    def update(self, batch: WeightedLosses) -> None:
        """Bins that the batch has no sample in stay."""
        bins = bins_of(batch.t, len(self.loss))
        count = np.bincount(bins, minlength=len(self.loss))
        held = count > 0
        mean_loss = np.bincount(bins, batch.loss, len(self.loss)) / np.maximum(count, 1)
        mean, baseline_mean, product, square, baseline = self._arrays()
        targets = (mean_loss, baseline, mean_loss * baseline, baseline**2, mean_loss)
        moved = [
            np.where(held, (1.0 - self.rate) * old + self.rate * new, old)
            for old, new in zip((mean, baseline_mean, product, square, baseline), targets)
        ]
        self.loss, self.baseline_mean, self.product, self.square, self.baseline = (x.tolist() for x in moved)

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def _arrays(self) -> tuple[Floats, ...]:
        fields = (self.loss, self.baseline_mean, self.product, self.square, self.baseline)
        return tuple(np.array(field) for field in fields)


CONTROL_VARIATES: dict[str, type[CentredVariate] | type[PaperVariate]] = {
    "centred": CentredVariate,
    "paper": PaperVariate,
}


def bins_of(t: Floats, num_bins: int) -> NDArray[np.int64]:
    """The number [n] of the equal bin of [0, 1] that each t is in."""
    return np.minimum((t * num_bins).astype(np.int64), num_bins - 1)
