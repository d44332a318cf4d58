"""Which eligible positions of a sample are masked: rules, complementary views, repeated masks, answer delimiters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.schema import DiffusionConfig
from megatron_mdm.diffusion.mask_schedule import MASK_SCHEDULES, Floats, MaskSchedule

Bools = NDArray[np.bool_]


class Masking(NamedTuple):
    masked: Bools  # [V, P]
    probability: Floats  # [P]: q, the marginal probability of each position; its cross-entropy is divided by it


class MaskingRule(Protocol):
    """How ordinary positions are masked, in one view or in two complementary ones with the same marginals."""

    def probability(self, t: Floats, count: Floats, schedule: MaskSchedule) -> Floats:
        """q of each of `count` positions at mask rate t; broadcasts."""
        ...

    def draw(self, uniforms: Floats, q: float) -> Bools:
        """uniforms [P] → masked [2, P]: a mask and its complementary view."""
        ...

    def same_view_deficit(self, q: Floats) -> Floats:
        """(P q)² − E[number of ordered pairs of distinct masked positions], per position."""
        ...

    def complementary_excess(self, q: Floats) -> Floats:
        """E[M₁ M₂] − (P q)² for the numbers of masked positions of complementary views, per position."""
        ...


class Bernoulli:
    """Each position is masked independently with probability q = p_mask(t) (paper, Section 2).

    MIRROR (paper, Section 4.2): view 1 masks U < q, view 2 masks U > 1 − q: the same marginal, disjoint for q < 1/2.
    """

    def probability(self, t: Floats, count: Floats, schedule: MaskSchedule) -> Floats:
        return schedule.mask_probability(t) + np.zeros_like(count)

    def draw(self, uniforms: Floats, q: float) -> Bools:
        masked = np.empty((2, len(uniforms)), dtype=np.bool_)
        np.less(uniforms, q, out=masked[0])
        np.greater(uniforms, 1.0 - q, out=masked[1])
        return masked

    def same_view_deficit(self, q: Floats) -> Floats:
        return q**2

    def complementary_excess(self, q: Floats) -> Floats:
        return np.maximum(2.0 * q - 1.0, 0.0) - q**2


class ExactCount:
    """A uniformly random subset of M = ⌊r(t) P⌋ + 1 positions, each with q = M/P: a masked token weighs P/M.

    For uniform t and linear rates it has the expectation of Bernoulli masks with ε = 0, since ∫ (1/t) t^M (1−t)^(P−M)
    dt = (M−1)! (P−M)! / P!, but neither the noise of the count nor unbounded weights. MIRROR: view 2 masks the M
    positions with the highest ranks.
    """

    def probability(self, t: Floats, count: Floats, schedule: MaskSchedule) -> Floats:
        return np.minimum(np.floor(schedule.rate(t) * count) + 1.0, count) / np.maximum(count, 1.0)

    def draw(self, uniforms: Floats, q: float) -> Bools:
        count = round(q * len(uniforms))
        rank = np.empty(len(uniforms), dtype=np.int64)
        rank[np.argsort(uniforms, kind="stable")] = np.arange(len(uniforms))
        return np.stack([rank < count, rank >= len(uniforms) - count])

    def same_view_deficit(self, q: Floats) -> Floats:
        return q

    def complementary_excess(self, q: Floats) -> Floats:
        return np.zeros_like(q)


class RoundedCount(ExactCount):
    """MMaDA's for images: M = r(t) P rounded (halves to even), at least 1 (its training/utils.py)."""

    def probability(self, t: Floats, count: Floats, schedule: MaskSchedule) -> Floats:
        return np.maximum(np.minimum(np.rint(schedule.rate(t) * count), count), 1.0) / np.maximum(count, 1.0)


MASKING_RULES: dict[str, MaskingRule] = {
    "bernoulli": Bernoulli(),
    "exact_count": ExactCount(),
    "rounded_count": RoundedCount(),
}


@dataclass(frozen=True)
class MaskDesign:
    """Everything about the masks of one sample but the rate t and the random numbers."""

    rule: MaskingRule
    schedule: MaskSchedule
    complementary: bool = False  # MIRROR: pairs of complementary views
    repeats: int = 1  # independent masks, or independent pairs (MultiSample-k)
    delimiter_shift: float = 0.0  # ISAD: delimiters are masked with probability min(1, p_mask(t) + shift)

    @classmethod
    def of(cls, config: DiffusionConfig) -> MaskDesign:
        """The design that a configuration asks for."""
        return cls(
            MASKING_RULES[config.masking],
            MASK_SCHEDULES[config.mask_schedule](config.epsilon),
            complementary=config.views == 2,
            repeats=config.multisample,
            delimiter_shift=config.isad.shift if config.isad.delimiters else 0.0,
        )

    @property
    def views(self) -> int:
        """Rows of the model per sample: V."""
        return self.repeats * (2 if self.complementary else 1)

    def probabilities(self, t: Floats, count: Floats, delimiter_count: Floats) -> tuple[Floats, Floats]:
        """(q of ordinary positions, q of delimiters) of samples with so many of them; broadcasts."""
        shifted = np.minimum(self.schedule.mask_probability(t) + self.delimiter_shift, 1.0)
        return self.rule.probability(t, count, self.schedule), shifted + np.zeros_like(delimiter_count)

    def draw(self, generator: np.random.Generator, q: float, delimiter_q: float, delimiters: Bools) -> Masking:
        """Masks of a sample's P eligible positions; delimiters [P] says which of them ISAD masks more often. q,
        delimiter_q: the sample's probabilities().

        ISAD's delimiters are masked independently, whatever the rule for the others; each token's cross-entropy is
        divided by its own q, but the contexts have another distribution, so ISAD's objective is a re-weighted one.
        """
        size = len(delimiters)
        has_delimiters = bool(delimiters.any())
        masked = np.empty((self.repeats, 2, size), dtype=np.bool_)
        for repeat in masked:
            uniforms = generator.random(size)
            if has_delimiters:
                repeat[:, ~delimiters] = self.rule.draw(uniforms[~delimiters], q)
                repeat[:, delimiters] = Bernoulli().draw(uniforms[delimiters], delimiter_q)
            else:
                repeat[:] = self.rule.draw(uniforms, q)
        views = masked if self.complementary else masked[:, :1]
        return Masking(views.reshape(-1, size), np.where(delimiters, delimiter_q, q))
