"""What densities of t are worth, judged by losses that they were not fitted to.

The judge shares nothing with the fit but the definition of the moment (curves.py): its E[l² | t] is a histogram, rates
of held-out token losses that are constant in each of some cells of t, times what the weights amount to. No curve, no
prior, no smoothing. A density fitted without a fold of the samples meets that fold (cross-fitting). All of it is
repeated on resamples of the samples (bootstrap), since losses of one sample go together.

The root of a noisy mean is low on average: the least possible variance, and with it the efficiency, is judged too low
rather than too high, the more so the fewer the losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.curves import GRADIENT, MEAN, SECOND_MOMENT, Term
from megatron_mdm.diffusion.exposure import Exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import WEIGHT_OF, column_of
from megatron_mdm.diffusion.t_samplers import CENTRES

Integers = NDArray[np.int64]

# A cell of the histogram is so wide that so many groups are in it and so many events (of the (Σa)²/Σa² of all losses
# together) are expected: its mean must be known well enough for a root to be taken. Wider than that only near 0, where
# it is this wide or half as wide as it is far from 0, and at most the last.
_LEAST_GROUPS = 30.0
_LEAST_SHARE = 0.01
_LEAST_EVENTS = 8.0
_FIRST_WIDTH = 0.01
_GROWTH = 0.5
_WIDTH = 0.05

# name of a target → (terms of the moment that judges a density, terms of the mean L; none where it is not known)
JUDGED: dict[str, tuple[tuple[Term, ...], tuple[Term, ...]]] = {
    "second_moment": (SECOND_MOMENT, MEAN),
    "paper": (SECOND_MOMENT, MEAN),
    "gradient": (GRADIENT, ()),
}


@dataclass(frozen=True)
class Efficiency:
    """Variances of w·l; for the gradient, second moments, as its mean is unknown."""

    minimal_variance: float  # (∫ sqrt(E[l²|t]) dt)² − L², no sampler of t has less
    sampler_variance: float  # ∫ E[l²|t]/p(t) dt − L²
    uniform_variance: float  # ∫ E[l²|t] dt − L²

    @property
    def of_sampler(self) -> float:
        return self._of(self.sampler_variance)

    @property
    def of_uniform(self) -> float:
        return self._of(self.uniform_variance)

    def _of(self, variance: float) -> float:
        """Estimates may be negative where the losses hardly vary: then nothing is known, and 0 is said; without any
        variance at all (no loss was seen) every sampler is as good as any."""
        if variance <= 0.0:
            return float(self.minimal_variance == variance == 0.0)
        return max(self.minimal_variance, 0.0) / variance


class _Histogram(NamedTuple):
    """One term: where each unit (a group, or a cell's sum of groups) and each of the samplers' cells falls."""

    key: Integers  # [n]: cell of the histogram · folds + fold
    amounts: Floats  # [n]
    exposures: Floats  # [n]
    amount_squares: Floats  # [n]
    cell: Integers  # [4096]
    known: Floats  # [4096]


class Judge:
    """Judges densities of one estimator; pure and the same on every rank."""

    def __init__(
        self, moments: Floats, exposures: Exposures, target: str, fold: Integers | None = None, num_folds: int = 1
    ) -> None:
        """moments [n, len(Moments._fields)]: of groups or of cells' sums; fold [n]: which of num_folds each is of."""
        held = column_of(moments, "one") > 0
        self.num_folds = num_folds
        fold = np.zeros(len(moments), dtype=np.int64) if fold is None else fold
        self.num_units = len(moments)
        known = exposures(CENTRES)
        self._held = held
        self._fold = fold[held]
        terms, mean_terms = JUDGED[target]
        self._terms, self._mean_terms = (
            [self._histogram(moments[held], term, term.known(known), _LEAST_EVENTS) for term in kind]
            for kind in (terms, mean_terms)
        )
        # No root is taken where densities are only compared, so that means of few events do no harm.
        self._fine_terms = [self._histogram(moments[held], term, term.known(known), 0.0) for term in terms]

    def _histogram(self, moments: Floats, term: Term, known: Floats, least_events: float) -> _Histogram:
        t = column_of(moments, "t") / column_of(moments, "one")
        weight = WEIGHT_OF[term.amounts]
        amounts, exposures = (column_of(moments, name) for name in (term.amounts, weight))
        amount_squares, exposure_squares = (column_of(moments, f"{name}_square") for name in (term.amounts, weight))
        num_groups = exposures**2 / np.maximum(exposure_squares, 1e-300)
        num_events = amounts.sum() ** 2 / max(float(amount_squares.sum()), 1e-300)
        total = float(num_groups.sum())
        least = max(_LEAST_GROUPS, _LEAST_SHARE * total, least_events * total / max(num_events, 1e-300))
        edges = _edges(t, num_groups, least)
        unit, cell = (np.clip(np.searchsorted(edges, x, side="left") - 1, 0, len(edges) - 2) for x in (t, CENTRES))
        return _Histogram(unit * self.num_folds + self._fold, amounts, exposures, amount_squares, cell, known)

    def efficiency(
        self, densities: Sequence[Floats], final: Floats | None = None, multiplicity: Floats | None = None
    ) -> Efficiency:
        """densities: one [4096] for each fold, fitted without that fold's groups. final [4096]: the density that they
        stand for, fitted to all; it is judged no better than on the very losses that it knows. multiplicity [n]: how
        often each unit counts (a bootstrap's resample), once if not given."""
        choices = [densities] if final is None else [densities, [final] * self.num_folds]
        return self._efficiency(
            self._integrals(self._terms, [*choices, [np.ones(len(CENTRES))] * self.num_folds]), multiplicity
        )

    def second_moments(self, choices: Sequence[Sequence[Floats]]) -> tuple[Floats, Floats]:
        """∫ E[l²|t]/p dt under each choice of densities [C], and the standard error of its excess over the least [C].

        Losses count as events, whose squares are the variance of their sum; in each cell one more, of typical size, is
        thought possible than was seen: nothing is known to be safe because nothing happened there.
        """
        terms = self._fine_terms
        integrals = self._integrals(terms, choices)
        moments = _weighed(integrals, [self._rates(term, None) for term in terms])
        error = np.zeros(len(choices))
        for term, part in zip(terms, integrals):
            excess = part - part[moments.argmin()]
            amounts, exposures, squares = (self._sums(term, column) for column in term[1:4])
            typical = squares.sum() / max(float(amounts.sum()), 1e-300)
            squares = squares + typical**2 / self.num_folds
            inverse = 1.0 / np.maximum(exposures.sum(1, keepdims=True), 1e-100)
            error += np.sqrt((squares * np.square(inverse * excess)).sum((1, 2)))
        return moments, error

    def bootstrap(
        self,
        densities: Sequence[Floats],
        final: Floats,
        sample: Integers,
        num_resamples: int,
        generator: np.random.Generator,
    ) -> Floats:
        """Efficiencies [num_resamples] on resamples of the samples; sample [n]: each unit's, numbered from 0."""
        uniform = np.ones(len(CENTRES))
        integrals = self._integrals(
            self._terms, [densities, *([density] * self.num_folds for density in (final, uniform))]
        )
        resamples = _resamples(sample, num_resamples, generator)
        return np.array([self._efficiency(integrals, counts).of_sampler for counts in resamples])

    def _integrals(self, terms: Sequence[_Histogram], choices: Sequence[Sequence[Floats]]) -> list[Floats]:
        """Per term [C, cells, folds]: ∫ known/p dt over each cell, for each choice's density of each fold."""
        integrals = []
        for term in terms:
            size = int(term.cell.max()) + 1
            parts = [
                np.bincount(term.cell, term.known / density, size) / len(CENTRES)
                for densities in choices
                for density in densities
            ]
            integrals.append(np.array(parts).reshape(len(choices), self.num_folds, size).swapaxes(1, 2))
        return integrals

    def _efficiency(self, integrals: list[Floats], multiplicity: Floats | None) -> Efficiency:
        """integrals: of the samplers, and of uniform t last."""
        rates, mean_rates = (
            [self._rates(term, multiplicity) for term in terms] for terms in (self._terms, self._mean_terms)
        )
        *samplers, uniform = _weighed(integrals, rates)
        moment = sum(rate.sum(1)[term.cell] * term.known for rate, term in zip(rates, self._terms))
        loss = sum(
            float((rate.sum(1)[term.cell] * term.known).mean()) for rate, term in zip(mean_rates, self._mean_terms)
        )
        return Efficiency(
            minimal_variance=float(np.sqrt(moment).mean() ** 2 - loss**2),
            sampler_variance=float(max(samplers) - loss**2),
            uniform_variance=float(uniform - loss**2),
        )

    def _rates(self, term: _Histogram, multiplicity: Floats | None) -> Floats:
        """Each fold's share of the rate of a cell, [cells, folds]."""
        amounts, exposures = (self._sums(term, column, multiplicity) for column in (term.amounts, term.exposures))
        return amounts / np.maximum(exposures.sum(1, keepdims=True), 1e-300)

    def _sums(self, term: _Histogram, column: Floats, multiplicity: Floats | None = None) -> Floats:
        """Sums of a column by cell and fold, [cells, folds]."""
        values = column if multiplicity is None else column * multiplicity[self._held]
        size = (int(term.cell.max()) + 1) * self.num_folds
        return np.asarray(np.bincount(term.key, values, size), dtype=np.float64).reshape(-1, self.num_folds)


def _weighed(integrals: list[Floats], rates: list[Floats]) -> Floats:
    """∫ E[l²|t]/p dt of each choice, [C]: integrals of the terms times their rates, summed."""
    return np.sum([(part * rate).sum((1, 2)) for part, rate in zip(integrals, rates)], axis=0)


def _resamples(sample: Integers, num_resamples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """How often each unit [n] counts in each resample of the samples. Balanced: over all resamples, every sample is
    drawn as often as every other."""
    num_samples = int(sample.max()) + 1
    order = generator.permutation(np.tile(np.arange(num_samples), num_resamples)).reshape(num_resamples, -1)
    return (np.bincount(drawn, minlength=num_samples).astype(float)[sample] for drawn in order)


def _edges(t: Floats, num_groups: Floats, least: float) -> Floats:
    """Edges of cells of [0, 1], each with at least `least` of num_groups [n] at t [n], as far as there are so many."""
    order = np.argsort(t, kind="stable")
    t = t[order]
    total = np.cumsum(num_groups[order])
    edges = [0.0]
    counted = 0.0
    while edges[-1] < 1.0:
        place = int(np.searchsorted(total, counted + least))
        if place >= len(t) or total[-1] - total[place] < least / 2:
            edges.append(1.0)
        else:
            low = edges[-1]
            width = min(max(_FIRST_WIDTH, _GROWTH * low), _WIDTH)
            edges.append(min(max(float(t[place]), low + width), 1.0))
            counted = float(total[np.searchsorted(t, edges[-1], side="right") - 1])
    return np.array(edges)
