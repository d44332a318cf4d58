"""Online estimates of the training loss's variance from the losses that training computes anyway."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats


@dataclass
class OnlineVariance:
    """Running sums over samples with importance weight w = 1/p(t) and per-sample loss l (the mean over its views)."""

    count: int = 0
    sum_wl: float = 0.0
    sum_wl2: float = 0.0
    sum_w2l2: float = 0.0

    def update(self, weight: Floats, loss: Floats) -> None:
        """weight [n], loss [n], float64: the global batch, the same on every rank."""
        weighted = weight * loss
        self.count += len(loss)
        self.sum_wl += float(weighted.sum())
        self.sum_wl2 += float((weighted * loss).sum())
        self.sum_w2l2 += float(np.square(weighted).sum())

    def mean(self) -> float:
        """The mean of w·l."""
        return self.sum_wl / self.count if self.count else float("nan")

    def of_loss(self) -> float:
        """The variance l would have under uniform t (paper, Eq. 23): m2 − (N m1² − m2w)/(N − 1)."""
        if self.count < 2:
            return float("nan")
        m1, m2, m2w = (total / self.count for total in (self.sum_wl, self.sum_wl2, self.sum_w2l2))
        return m2 - (self.count * m1**2 - m2w) / (self.count - 1)

    def of_estimator(self) -> float:
        """The variance of w·l, the quantity that is averaged in training and that P-POTS minimises."""
        if self.count < 2:
            return float("nan")
        m1, m2w = self.sum_wl / self.count, self.sum_w2l2 / self.count
        return self.count / (self.count - 1) * (m2w - m1**2)

    def state(self) -> dict[str, float]:
        """The sums, JSON-able; OnlineVariance(**state) restores them."""
        return asdict(self)
