"""Online estimates of the training loss's variance from the losses that training computes anyway.

A run's loss falls while it is measured. So nothing is compared over a whole window: what varies within a global batch
is taken batch by batch, and what varies between batches from second differences of successive ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats

NAN = float("nan")


@dataclass
class BatchMeans:
    """The mean of one quantity over each global batch: its mean over batches, and its variance about a moving level."""

    count: int = 0
    total: float = 0.0
    num_differences: int = 0
    sum_differences: float = 0.0
    last: list[float] = field(default_factory=list)  # those of the two batches before

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        if len(self.last) == 2:
            self.num_differences += 1
            # Six times the variance on average, for independent batches, whatever line their level moves along.
            self.sum_differences += (self.last[0] - 2.0 * self.last[1] + value) ** 2 / 6.0
        self.last = [*self.last[-1:], value]

    def mean(self) -> float:
        return self.total / self.count if self.count else NAN

    def variance(self) -> float:
        """The variance of one batch's mean; not a number before there are three batches."""
        return self.sum_differences / self.num_differences if self.num_differences else NAN

    def next_window(self) -> BatchMeans:
        """Nothing counted yet, and the first difference taken to the batches before."""
        return BatchMeans(last=self.last)


@dataclass
class OnlineVariance:
    """Sums over global batches of n samples: of importance weights w = 1/p(t), losses l (the mean over a sample's
    views) and terms x, whose mean is the batch's loss: w·l times the sample's share by the normalisation."""

    losses: BatchMeans = field(default_factory=BatchMeans)  # of w·l
    terms: BatchMeans = field(default_factory=BatchMeans)  # of x: the losses that were minimised
    batch_size: int = 0  # n
    spread_losses: float = 0.0  # Σ over batches of mean(w l²) − mean(w l)²
    spread_terms: float = 0.0  # Σ over batches of the sample variance of x
    sum_wl2: float = 0.0  # over samples
    sum_w2l2: float = 0.0

    def update(self, weight: Floats, loss: Floats, term: Floats) -> None:
        """Add one global batch: importance weights, losses and terms, [n] each, float64, the same on every rank."""
        self.batch_size = len(loss)
        weighted = weight * loss
        self.losses.add(float(weighted.mean()))
        self.terms.add(float(term.mean()))
        self.spread_losses += float((weighted * loss).mean() - weighted.mean() ** 2)
        self.spread_terms += float(term.var(ddof=1)) if len(term) > 1 else 0.0
        self.sum_wl2 += float((weighted * loss).sum())
        self.sum_w2l2 += float(np.square(weighted).sum())

    def mean(self) -> float:
        """The mean of the batches' losses."""
        return self.terms.mean()

    def of_loss(self) -> float:
        """The variance l would have under independent, uniform t: E[w l²] − E[w l]², about a moving level.

        Unbiased however the t of a batch depend on each other (StraTS), for E[w l]² is corrected by what batches' means
        are seen to vary. Before the run's third batch there is nothing to see: then it is of_loss_eq_23.
        """
        between = self.losses.variance()
        return self.of_loss_eq_23() if np.isnan(between) else self.spread_losses / self.losses.count + between

    def of_loss_eq_23(self) -> float:
        """The same by the paper's Eq. 23, m2 − (N m1² − m2w)/(N − 1), over all N samples: the movement of the level
        counts, and t is taken to be independent (for strata, a batch alone gives up to 1/n too much)."""
        number = self.losses.count * self.batch_size
        if number < 2:
            return NAN
        m1 = self.losses.mean()
        m2 = self.sum_wl2 / number
        m2w = self.sum_w2l2 / number
        return m2 - (number * m1**2 - m2w) / (number - 1)

    def of_term(self) -> float:
        """The variance of x from sample to sample of a batch: n times that of the batch's loss for independent t."""
        return self.spread_terms / self.terms.count if self.batch_size > 1 else NAN

    def of_estimator(self) -> float:
        """n times the variance of the batch's loss from batch to batch: strata and shares that depend on the batch
        count as they are. Its relative standard error over k batches is about 2/√k."""
        return self.batch_size * self.terms.variance()

    def next_window(self) -> OnlineVariance:
        return OnlineVariance(self.losses.next_window(), self.terms.next_window())

    def state(self) -> dict[str, Any]:
        """The sums, JSON-able; of_state restores them."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> OnlineVariance:
        """The sums of a state; empty ones where it was written before batches were told apart."""
        if "losses" not in state:
            return cls()
        means = {name: BatchMeans(**state[name]) for name in ("losses", "terms")}
        return cls(**{**state, **means})
