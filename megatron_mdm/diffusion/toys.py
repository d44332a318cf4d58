"""Token losses whose moments are known in closed form: what a calibration finds is compared with the truth.

A toy is a distribution of the masked tokens' losses given t, in place of model and data. Its samples have P tokens; a
masked token's loss is mean(t) times noise of mean 1, times a factor of its sample and a factor of its group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.exposure import Exposures, SampleShapes, exposures
from megatron_mdm.diffusion.mask_schedule import Floats, LinearSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.moments import RowSums, group_moments
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.diffusion.t_samplers import TSampler

EPSILON = 1e-3
_GRID: Floats = (np.arange(32768) + 0.5) / 32768
_SCHEDULE = LinearSchedule(EPSILON)


class Noise(Protocol):
    """A token's loss around its mean."""

    def draw(self, generator: np.random.Generator, mean: Floats) -> Floats:
        """Losses [n, V, P] of groups of V rows; mean has that shape."""
        ...

    def square(self, mean: Floats) -> Floats:
        """E[c²]"""
        ...

    def pair(self, mean: Floats) -> Floats:
        """E[c c'] of different tokens, or of one in two rows, of a group."""
        ...


@dataclass(frozen=True)
class LogNormal:
    sigma: float

    def draw(self, generator: np.random.Generator, mean: Floats) -> Floats:
        return mean * np.exp(self.sigma * generator.normal(size=mean.shape) - self.sigma**2 / 2)

    def square(self, mean: Floats) -> Floats:
        return mean**2 * np.exp(self.sigma**2)

    def pair(self, mean: Floats) -> Floats:
        return mean**2


@dataclass(frozen=True)
class Exponential:
    def draw(self, generator: np.random.Generator, mean: Floats) -> Floats:
        return mean * generator.exponential(size=mean.shape)

    def square(self, mean: Floats) -> Floats:
        return 2.0 * mean**2

    def pair(self, mean: Floats) -> Floats:
        return mean**2


@dataclass(frozen=True)
class Mistakes:
    """A token is right, at no loss, or, with probability mean/size, wrong, at an exponential one."""

    size: float

    def draw(self, generator: np.random.Generator, mean: Floats) -> Floats:
        wrong = generator.random(mean.shape) < mean / self.size
        return wrong * generator.exponential(self.size, mean.shape)

    def square(self, mean: Floats) -> Floats:
        return 2.0 * self.size * mean

    def pair(self, mean: Floats) -> Floats:
        return mean**2


@dataclass(frozen=True)
class Bursts:
    """Like Mistakes, but either `share` of a group's tokens are wrong, or none is."""

    size: float
    share: float

    def draw(self, generator: np.random.Generator, mean: Floats) -> Floats:
        bad = generator.random((len(mean), 1, 1)) < mean / (self.size * self.share)
        return bad * (generator.random(mean.shape) < self.share) * generator.exponential(self.size, mean.shape)

    def square(self, mean: Floats) -> Floats:
        return 2.0 * self.size * mean

    def pair(self, mean: Floats) -> Floats:
        return self.size * self.share * mean


@dataclass(frozen=True)
class Toy:
    mean: Callable[[Floats], Floats]  # of a masked token's loss at t
    noise: Noise
    sample_sigma: float = 0.0  # of log-normal factors
    group_sigma: float = 0.0
    complementary: bool = False  # MIRROR
    num_tokens: int = 24  # P

    @property
    def design(self) -> MaskDesign:
        return MaskDesign(MASKING_RULES["bernoulli"], _SCHEDULE, self.complementary)

    def exposures(self) -> Exposures:
        return exposures(
            self.design, SampleShapes.of(np.array([self.num_tokens]), np.array([0])), NORMALIZATIONS["sample"]
        )

    def moments_at(self, t: Floats) -> tuple[Floats, Floats]:
        """(E[l | t], E[l² | t]) of a group [T]."""
        mean = self.mean(t)
        q = _SCHEDULE.mask_probability(t)
        num = self.num_tokens
        common = np.exp(self.sample_sigma**2 + self.group_sigma**2)  # E[factor²]
        square = self.noise.square(mean) * common
        pair = self.noise.pair(mean) * common
        row = square / (num * q) + (1.0 - 1.0 / num) * pair
        if not self.complementary:
            return mean, row
        # two rows: different tokens are masked together with probability q², the same one with 2q − 1
        both = (num * (num - 1) * q**2 + num * np.maximum(2.0 * q - 1.0, 0.0)) * pair
        return mean, (row + both / (num * q) ** 2) / 2.0

    def efficiency(self, sampler: TSampler) -> float:
        """The least possible variance over the sampler's: the truth."""
        mean, square = self.moments_at(_GRID)
        loss = mean.mean()
        return float((np.sqrt(square).mean() ** 2 - loss**2) / ((square / sampler.density(_GRID)).mean() - loss**2))


class ToyMeasurement:
    """Moments of a toy's groups, drawn from one seed; called as a model's are measured."""

    def __init__(self, toy: Toy, num_samples: int, seed: int) -> None:
        self.toy = toy
        self.generator = np.random.default_rng(seed)
        self.factors = self._factors(toy.sample_sigma, num_samples)

    def __call__(self, samples: NDArray[np.int64], t: Floats) -> Floats:
        """Moments [n, len(Moments._fields)] of sample samples[i] noised at t[i]."""
        q = _SCHEDULE.mask_probability(t)[:, None]
        toy = self.toy
        uniforms = self.generator.random((len(t), toy.num_tokens))
        masked = np.stack([uniforms < q, *([uniforms > 1.0 - q] if toy.complementary else [])], axis=1)
        mean = np.broadcast_to(toy.mean(t)[:, None, None], masked.shape)
        factor = self.factors[samples] * self._factors(toy.group_sigma, len(t))
        loss = toy.noise.draw(self.generator, mean) * factor[:, None, None]
        weight = masked / (toy.num_tokens * q)[:, None]
        sums = (weight * loss, np.square(weight * loss), np.zeros_like(loss), weight, weight**2)
        return group_moments(t, q[:, 0], RowSums(*(value.sum(2) for value in sums)))

    def _factors(self, sigma: float, size: int) -> Floats:
        return np.exp(sigma * self.generator.normal(size=size) - sigma**2 / 2) if sigma else np.ones(size)


def _line(start: float, end: float) -> Callable[[Floats], Floats]:
    return lambda t: start + (end - start) * t


TOYS: dict[str, Toy] = {
    "rising .05 → 1.5": Toy(_line(0.05, 1.5), LogNormal(0.7)),
    "rising .2 → 1.7": Toy(_line(0.2, 1.7), LogNormal(0.7)),
    "rising .5 → 1.5": Toy(_line(0.5, 1.5), LogNormal(0.7)),
    "flat": Toy(_line(1.0, 1.0), LogNormal(0.7)),
    "flat, heavy tail": Toy(_line(0.5, 0.5), LogNormal(1.5)),
    "falling": Toy(_line(1.5, 0.3), Exponential()),
    "rising late": Toy(lambda t: 0.1 + 2.0 * t**4, Exponential()),
    "rising early": Toy(lambda t: 0.1 + 1.4 * np.sqrt(t), Exponential()),
    "samples differ": Toy(_line(0.2, 1.5), Exponential(), sample_sigma=0.7),
    "tokens go together": Toy(_line(0.2, 1.5), Exponential(), group_sigma=0.7),
    "rising mistakes": Toy(_line(0.005, 0.2), Mistakes(1.0)),
    "rare mistakes": Toy(_line(0.02, 0.02), Mistakes(1.0)),
    "bursts of mistakes": Toy(_line(0.002, 0.06), Bursts(1.0, 0.2)),
}
