"""Where a model's training noise comes from, and what each method leaves of it: in the loss and in the gradient.

Losses and gradients of single samples are drawn once for each way of masking, at uniform t, with the same samples and t
for all. Every sampler of t and every stratification is then judged on the same draws:

    E_p‖w G‖² = ∫ E[‖G‖² | t] / p(t) dt,   and strata of the quantile take away the spread of E[wG | stratum].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.data.collate import collate
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.exposure import SampleShapes, average_batch
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.noiser import noise
from megatron_mdm.diffusion.objective import Normalization
from megatron_mdm.diffusion.t_samplers import TSampler
from megatron_mdm.engine.inputs import loss_inputs
from megatron_mdm.models.layers import MaskedDiffusionModel
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.progress import progress_bar

SKETCH_SIZE = 2048  # numbers that stand for a gradient where inner products are needed
NUM_RESAMPLES = 400


class Decomposition(NamedTuple):
    """Var(l) = A + B + C, each unbiased, so possibly negative."""

    masks: float  # A: of the masking pattern
    rate: float  # B: of the mask rate t
    data: float  # C: of the sample

    @property
    def total(self) -> float:
        return self.masks + self.rate + self.data


def decompose(loss: Floats) -> Decomposition:
    """Nested analysis of variance of loss [a, b, c]: sample i, rate t_ij drawn uniformly for it, mask k."""
    _, num_times, num_masks = loss.shape
    masks = loss.var(2, ddof=1).mean()
    of_rates = loss.mean(2).var(1, ddof=1).mean()  # B + A/c
    of_samples = loss.mean((1, 2)).var(ddof=1)  # C + (B + A/c)/b
    return Decomposition(float(masks), float(of_rates - masks / num_masks), float(of_samples - of_rates / num_times))


def bootstrap_decomposition(loss: Floats, seed: int = 0) -> Floats:
    """A, B, C and their sum of resampled samples, [NUM_RESAMPLES, 4]."""
    generator = np.random.default_rng(seed)
    results = []
    for _ in range(NUM_RESAMPLES):
        parts = decompose(loss[generator.integers(0, len(loss), len(loss))])
        results.append([*parts, parts.total])
    return np.array(results)


@dataclass(frozen=True)
class Draws:
    """Losses and gradients of N single samples at uniform t, each the mean over its V rows."""

    t: Floats  # [N]
    loss: Floats  # [N]
    square: Floats  # [N]: ‖G‖², exact
    sketch: NDArray[np.float32]  # [N, SKETCH_SIZE]: inner products of sketches are those of gradients on average
    views: int  # V: passes that a sample costs


class Sketch:
    """A count sketch (Charikar et al. 2002): every weight goes, with a random sign, to one of a few buckets."""

    def __init__(self, model: torch.nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.parameters]
        self.bucket = torch.randint(0, SKETCH_SIZE, (sum(sizes),), generator=generator)
        self.sign = torch.randint(0, 2, (sum(sizes),), generator=generator, dtype=torch.int8) * 2 - 1

    def take(self) -> tuple[float, NDArray[np.float32]]:
        """(‖G‖², sketch) of the gradients that backward left, which are cleared."""
        flat = self.gradient()
        return float(flat.double().square().sum()), self.of(flat)

    def gradient(self) -> Tensor:
        """[n] float32 on the host: the gradients that backward left, which are cleared."""
        flat = torch.cat([cast(Tensor, parameter.grad).float().reshape(-1).cpu() for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        return flat

    def of(self, flat: Tensor) -> NDArray[np.float32]:
        """flat [n] → sketch [SKETCH_SIZE]."""
        return torch.zeros(SKETCH_SIZE).index_add_(0, self.bucket, flat * self.sign).numpy()


def draw_gradients(
    model: MaskedDiffusionModel,
    data: SftDataset,
    samples: NDArray[np.int64],
    t: Floats,
    generators: Callable[[int], np.random.Generator],
    design: MaskDesign,
    normalization: Normalization,
    mask_id: int,
    name: str,
) -> Draws:
    """Forward and backward of each sample alone. samples, t [N]; generators(i): random numbers of draw i's masks."""
    sketch = Sketch(model)
    batch_of = average_batch(design, SampleShapes.of(data.num_eligible(), data.num_delimiters()))
    loss, square = np.zeros((2, len(t)))
    sketches = np.zeros((len(t), SKETCH_SIZE), dtype=np.float32)
    for index in progress_bar(range(len(t)), desc=name, unit="draw"):
        row = samples[index]
        batch = collate([data.samples[row]], [0], [row], 0)
        noised = noise(batch, t[index : index + 1], np.ones(1), [generators(index)], design=design, mask_id=mask_id)
        inputs = loss_inputs(noised, normalization(noised, batch_of))
        total, _ = model(inputs.to(platform.device()))
        total.backward()
        loss[index] = float(total)
        square[index], sketches[index] = sketch.take()
    return Draws(t, loss, square, sketches, design.views)


class Variances(NamedTuple):
    """Variances per sample of the batch: n · Var(batch mean)."""

    loss: float
    gradient: float


FULL = (0.0, 1.0)


def variances(
    draws: Draws, sampler: TSampler, num_strata: int, bounds: tuple[float, float], multiplicity: Floats
) -> Variances:
    """Variances under a sampler of t and strata of its quantile. bounds: of a clipped sampler (unweighted, uniform
    inside), else
    FULL; multiplicity [N]: how often each draw counts. Squared means use pairs of different draws, so that their own
    noise does not enter."""
    inside = (draws.t >= bounds[0]) & (draws.t <= bounds[1])
    t = draws.t[inside]
    weight = multiplicity[inside]
    loss = draws.loss[inside]
    share = 1.0 / sampler.density(t) if bounds == FULL else np.ones_like(t)
    stratum = np.searchsorted(sampler.quantile(np.arange(1, num_strata) / num_strata)[0], t, side="right")
    results = []
    for square, vectors in ((loss**2, loss[:, None]), (draws.square[inside], draws.sketch[inside])):
        second = (weight * share * square).sum() / weight.sum()
        results.append(float(second - _mean_square_of_strata(vectors, weight, stratum, num_strata)))
    return Variances(*results)


def _mean_square_of_strata(
    vectors: NDArray[np.floating], weight: Floats, stratum: NDArray[np.int64], num_strata: int
) -> float:
    """Mean over strata of ‖E[w G | stratum]‖². Over the quantile, that expectation is K ∫ G dt over the stratum's
    interval of t: K/N times a sum of unweighted draws."""
    total = 0.0
    for index in range(num_strata):
        here = stratum == index
        mine = vectors[here]
        times = weight[here]
        size = times.sum()
        squares = np.square(times).sum()
        if size**2 <= squares:
            continue
        pairs = np.square(times @ mine).sum() - np.square(times) @ np.square(mine, dtype=np.float64).sum(1)
        total += pairs * size**2 / (size**2 - squares)
    return float(total * num_strata / weight.sum() ** 2)


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    draws: str  # key of the draws it uses
    sampler: TSampler
    num_strata: int = 1
    bounds: tuple[float, float] = FULL
    biased: bool = False


class Comparison(NamedTuple):
    """A method's variances relative to the standard method's, with 90 % bootstrap intervals."""

    name: str
    biased: bool
    passes: int
    loss: tuple[float, float, float]  # (ratio, lower, upper) at equal samples
    gradient: tuple[float, float, float]


def compare(methods: Sequence[Method], draws: dict[str, Draws], seed: int = 0) -> list[Comparison]:
    """Every method against the first. Resamples of the draws are the same for all, since samples and t are."""
    generator = np.random.default_rng(seed)
    size = len(next(iter(draws.values())).t)
    resamples = [np.ones(size)]
    for _ in range(NUM_RESAMPLES // 4):
        resamples.append(np.bincount(generator.integers(0, size, size), minlength=size).astype(float))
    table = np.array(
        [
            [variances(draws[m.draws], m.sampler, m.num_strata, m.bounds, multiplicity) for m in methods]
            for multiplicity in resamples
        ]
    )  # [1 + resamples, methods, 2]
    ratios = table / table[:, :1]
    low, high = np.quantile(ratios[1:], [0.05, 0.95], axis=0)
    return [
        Comparison(
            method.name,
            method.biased,
            draws[method.draws].views,
            *((float(ratios[0, index, kind]), float(low[index, kind]), float(high[index, kind])) for kind in range(2)),
        )
        for index, method in enumerate(methods)
    ]
