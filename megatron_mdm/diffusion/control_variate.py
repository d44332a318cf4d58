"""Bin-wise exponential moving averages as a control variate of the *reported* loss (paper, Section 4.4)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats

_RIDGE = 1e-6


@dataclass
class BinwiseControlVariate:
    """adjusted loss = l − c·b, with c = Cov(l, b) / Var(b) and the baseline b kept per bin of t.

    c·b is a constant to the gradient, so **training is exactly that of the standard method**; only the loss that is
    reported, and its variance, change. State: [m] each, m bins; `rate` is α. Rules of thumb (paper): m ∝ N^(1/5) and
    m · batch / α ≈ 0.1 · |training set|. The paper advises against combining it with stratified t.
    """

    rate: float
    loss: list[float]  # μ_L
    baseline_mean: list[float]  # μ_H
    product: list[float]  # M_LH
    square: list[float]  # M_HH
    baseline: list[float]  # b

    @classmethod
    def new(cls, num_bins: int, rate: float) -> BinwiseControlVariate:
        return cls(rate, *([0.0] * num_bins for _ in range(5)))

    def adjusted(self, t: Floats, loss: Floats) -> Floats:
        """l − c·b [n] of the global batch's losses [n] at t [n], by the averages of earlier steps."""
        mean, baseline_mean, product, square, baseline = self._arrays()
        c = (product - mean * baseline_mean) / (square - baseline_mean**2 + _RIDGE)
        return loss - (c * baseline)[self._bins(t)]

    def update(self, t: Floats, loss: Floats) -> None:
        """Move the averages towards this global batch's; bins that it has no sample in stay."""
        bins = self._bins(t)
        count = np.bincount(bins, minlength=len(self.loss))
        held = count > 0
        mean_loss = np.bincount(bins, loss, len(self.loss)) / np.maximum(count, 1)
        mean, baseline_mean, product, square, baseline = self._arrays()
        targets = (mean_loss, baseline, mean_loss * baseline, baseline**2, mean_loss)
        moved = [
            np.where(held, (1.0 - self.rate) * old + self.rate * new, old)
            for old, new in zip((mean, baseline_mean, product, square, baseline), targets)
        ]
        self.loss, self.baseline_mean, self.product, self.square, self.baseline = (x.tolist() for x in moved)

    def state(self) -> dict[str, Any]:
        """JSON-able; BinwiseControlVariate(**state) restores it."""
        return asdict(self)

    def _arrays(self) -> tuple[Floats, ...]:
        fields = (self.loss, self.baseline_mean, self.product, self.square, self.baseline)
        return tuple(np.array(field) for field in fields)

    def _bins(self, t: Floats) -> np.ndarray:
        num_bins = len(self.loss)
        return np.minimum((t * num_bins).astype(np.int64), num_bins - 1)
