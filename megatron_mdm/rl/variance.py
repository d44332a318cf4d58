"""Noise and bias of an update's gradient: what its choice of rates and masks does, for fixed weights and completions.

g is the gradient of the objective over B groups, as random as its rates and masks are. With g* the gradient that the
bound of every completion gives, its exact policy gradient for this family of estimates,

    scale = ⟨E g, g*⟩ / ‖g*‖²                       cosine = ⟨E g, g*⟩ / (‖E g‖ ‖g*‖)
    noise = tr Var g / (scale² ‖g*‖²)               alignment = ⟨E g, g*⟩ / (‖g*‖ √E‖g‖²)

none of which but the first depends on a gradient's scale. Alignment is 1/√(1 + noise) where E g is along g*, and less
where it is not: bias and noise in one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.mask_schedule import Floats

NUM_RESAMPLES = 400
INTERVAL = (0.05, 0.95)


@dataclass(frozen=True)
class Sums:
    """Of R draws of an update's gradient. Sketches are inner products' sake: theirs are those of gradients on average
    (reports/variance.py)."""

    rows: int  # K, of each completion
    draws: int  # R
    mean: NDArray[np.float32]  # [B, S]: sketch of each group's mean gradient
    products: Floats  # [R, B, B]: of groups' gradients less their mean, inner products in each draw, by sketches
    mean_square: float  # ‖ḡ‖² of the mean of all draws, exact
    variance: float  # tr Var g, exact and unbiased
    inner: float  # ⟨ḡ, ḡ*⟩, exact; with the target's own draws in place of g*'s, NaN
    t: Floats  # [R, B]: rate of a group's first completion
    squares: Floats  # [R, B]: ‖gradient of the group‖², exact

    @property
    def power(self) -> float:
        """‖E g‖², unbiased."""
        return self.mean_square - self.variance / self.draws

    @property
    def covariance(self) -> Floats:
        """[B, B]: of groups' gradients, by sketches."""
        return self.products.sum(0) / (self.draws - 1)

    @classmethod
    def names(cls) -> list[str]:
        """Of arrays()."""
        return [part.name for part in fields(cls)]

    def arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Sums:
        """What arrays() gave, as a file holds it."""
        return cls(**{name: _plain(arrays[name]) for name in cls.names()})


def _plain(array: Any) -> Any:
    return array if np.ndim(array) else np.asarray(array).item()


class Kind(NamedTuple):
    """What is known of a design without any draw."""

    exact: bool  # E g = g*, where θ is θ_old
    independent: bool  # groups have noise of their own: none of them in common, and no strata over them


class Measured(NamedTuple):
    """Each [estimate, lower, upper]: 90 % intervals over prompts and draws."""

    noise: Floats
    relative_noise: Floats  # to the first design's
    cosine: Floats
    alignment: Floats
    scale: Floats  # as measured: 1 for exact designs, but for its error


def resamples(number: int, seed: int = 0) -> Floats:
    """[1 + NUM_RESAMPLES, number]: how often each group, or each draw, counts; once each in the first."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, number)), drawn.astype(float)])


def measured(sums: Sums, kind: Kind, first: Sums, of_first: Kind, target: Sums) -> Measured:
    """Noise, bias and both of a design. Estimates are of whole gradients, intervals of sketches.

    What is known is used, since ‖E g‖² is hard to tell from noisy draws: exact designs have scale and cosine 1, and
    independent groups no covariance. The measured scale is told all the same.
    """
    multiplicity = resamples(len(sums.mean))
    wanted = _Estimates(target.power, _power(target, multiplicity))
    variance, along = _variance(sums, kind, multiplicity), _along(sums, target, wanted, multiplicity)
    base, base_along = _variance(first, of_first, multiplicity), _along(first, target, wanted, multiplicity)
    one = _Estimates(1.0, np.ones(len(multiplicity)))
    scale, base_scale = (one if each.exact else found for each, found in ((kind, along), (of_first, base_along)))
    power = wanted if kind.exact else _Estimates(sums.power, _power(sums, multiplicity))

    def of(formula: Callable[..., Any]) -> Floats:
        return _interval(*(formula(*each) for each in zip(variance, base, base_scale, wanted, scale, power)))

    return Measured(
        noise=of(lambda v, b, bs, w, s, p: v / (s**2 * w)),
        relative_noise=of(lambda v, b, bs, w, s, p: v / s**2 / (b / bs**2)),
        cosine=of(lambda v, b, bs, w, s, p: s * np.sqrt(w / p)),
        alignment=of(lambda v, b, bs, w, s, p: s * np.sqrt(w / (p + v))),
        scale=_interval(*along),
    )


def _interval(exact: float, sketched: Floats) -> Floats:
    return exact * np.array([1.0, *np.quantile(sketched[1:] / sketched[0], INTERVAL)])


class _Estimates(NamedTuple):
    exact: float
    sketched: Floats  # [1 + resamples]: the first is of all groups


def _own(sums: Sums) -> Floats:
    """[B]: tr Var of each group's gradient; squares are exact, and the sketched means that are taken off small."""
    mean = np.square(sums.mean, dtype=np.float64).sum(1)
    return (sums.squares.sum(0) - sums.draws * mean) / (sums.draws - 1)


def _variance(sums: Sums, kind: Kind, multiplicity: Floats) -> _Estimates:
    """Sketched: of resampled draws, too. What groups have in common is an average over draws alone."""
    products = sums.products
    if kind.independent:
        products = products * np.eye(products.shape[1])
    covariance = np.tensordot(resamples(sums.draws, seed=1), products, 1) / (sums.draws - 1)
    exact = float(_own(sums).sum()) if kind.independent else sums.variance
    return _Estimates(exact, of_resampled(covariance, multiplicity))


def _along(sums: Sums, target: Sums, wanted: _Estimates, multiplicity: Floats) -> _Estimates:
    """The component of E g along g*, whose square is `wanted`."""
    sketched = of_resampled(_products(sums, target), multiplicity) / wanted.sketched
    return _Estimates(sums.inner / wanted.exact, sketched)


def of_resampled(products: Floats, multiplicity: Floats) -> Floats:
    """Σ of products [B, B], or [resamples, B, B], over all pairs of resampled groups, [resamples].

    A copy of a group is another group like it. What two copies of one have in common was not drawn (their rates are
    strata, too; their means are not each other's), so pairs of different groups stand for all pairs.
    """
    number = multiplicity.sum(1)
    own = np.diagonal(products, axis1=-2, axis2=-1)
    squares = np.square(multiplicity)
    left = np.einsum("rg,rgh->rh", multiplicity, products) if products.ndim == 3 else multiplicity @ products
    pairs = (left * multiplicity).sum(1) - (squares * own).sum(1)
    return (multiplicity * own).sum(1) + pairs * number * (number - 1) / np.maximum(number**2 - squares.sum(1), 1e-300)


def _power(sums: Sums, multiplicity: Floats) -> Floats:
    """‖E g‖² of resampled groups, unbiased, but at least a thousandth of what it is for orthogonal groups: of groups
    whose gradients cancel it may be estimated as 0 or less."""
    products = _products(sums, sums)
    estimate = of_resampled(products - sums.covariance / sums.draws, multiplicity)
    return np.maximum(estimate, 1e-3 * multiplicity @ np.diag(products))


def _products(one: Sums, other: Sums) -> Floats:
    """[B, B]: inner products of groups' mean gradients."""
    return one.mean.astype(np.float64) @ other.mean.astype(np.float64).T


def fitted_density(sums: Sums, num_cells: int = 8, floor: float = 0.1) -> Floats:
    """[cells]: the density of rates that least varies these groups' squared gradients, p ∝ √E[‖g‖² | t], in equal cells
    and mixed with the uniform one. From uniform rates."""
    cell = np.minimum((sums.t * num_cells).astype(int), num_cells - 1).ravel()
    squares = sums.squares.ravel()
    counts = np.bincount(cell, minlength=num_cells)
    mean = np.bincount(cell, squares, num_cells) / np.maximum(counts, 1)
    density = np.sqrt(np.where(counts > 0, mean, squares.mean()))
    return (1.0 - floor) * density / density.mean() + floor
