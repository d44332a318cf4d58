"""A tiny random transformer whose losses and gradients are enumerated: every mask of P positions of two samples."""

from __future__ import annotations

from copy import copy
from functools import cache

import numpy as np
import torch

from megatron_mdm.batch import CleanBatch, Full
from megatron_mdm.diffusion.exposure import SampleShapes
from megatron_mdm.diffusion.mask_schedule import CosineSchedule, Floats, LinearSchedule, MaskSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, Bools, MaskDesign, Masking
from megatron_mdm.diffusion.moments import RowSums
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.t_samplers import TSampler
from tests.ranks import run_ranks
from tests.small import MASK, small_model

P = 5
NUM_SAMPLES = 2
PROMPT = 3
EPSILON = 0.1  # bounds the weights 1/q, so that sample variances settle
SCHEDULE = LinearSchedule(EPSILON)
COSINE = CosineSchedule(EPSILON)
MASKS = (np.arange(2**P)[:, None] >> np.arange(P)) & 1  # [2^P, P]
KINDS = ("loss", "gradient")


def design(
    rule: str = "bernoulli", complementary: bool = False, repeats: int = 1, schedule: MaskSchedule = SCHEDULE
) -> MaskDesign:
    return MaskDesign(MASKING_RULES[rule], schedule, complementary, repeats)


def draw(design: MaskDesign, generator: np.random.Generator, t: float, delimiters: Bools) -> Masking:
    """A sample's masks at a mask rate."""
    counts = (np.array([float(np.count_nonzero(kind))]) for kind in (~delimiters, delimiters))
    (q,), (delimiter_q,) = design.probabilities(np.array([t]), *counts)
    return design.draw(generator, float(q), float(delimiter_q), delimiters)


@cache
def tables() -> dict[str, Floats]:
    """kind → [samples, 2^P, P]: cross-entropy of each masked token, and its derivative by one weight of a layer."""
    return run_ranks(_tables, 1)[0]


def _tables() -> dict[str, Floats]:
    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    # Weights large enough that losses differ between masks by more than between tokens.
    model = build_model(small_model(init_std=0.35), ParallelConfig(), initialize(), 5).double()
    weight = model[1].layer.mlp.linear_fc2.weight
    result = {kind: np.zeros((NUM_SAMPLES, 2**P, P)) for kind in KINDS}
    for sample in range(NUM_SAMPLES):
        clean = torch.from_numpy(np.random.default_rng(sample).integers(2, MASK, PROMPT + P))
        for index, mask in enumerate(MASKS[1:], 1):
            masked = torch.from_numpy(np.concatenate([np.zeros(PROMPT, dtype=bool), mask.astype(bool)]))[None]
            noisy = clean[None].masked_fill(masked, MASK)
            logits = model(logits_inputs(noisy, Full(), masked), want_logits=True)
            losses = torch.nn.functional.cross_entropy(logits, clean[masked[0]], reduction="none")
            for place, loss in zip(np.flatnonzero(mask), losses):
                (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
                result["loss"][sample, index, place] = loss.item()
                result["gradient"][sample, index, place] = gradient[3, 5].item() * 30.0
    return result


class Toy:
    """Estimates and their enumeration for one kind of table; the samples may be fewer."""

    def __init__(self, kind: str = "loss", num_samples: int = NUM_SAMPLES) -> None:
        self.tables = tables()[kind][:num_samples]

    def rows(self, noised: NoisedBatch, sample: Floats) -> RowSums:
        """Sums over masked tokens [B, V]; sample [B] says which table each row of the batch uses."""
        masked = noised.masked.numpy().astype(int)
        values = self.tables[np.tile(sample, noised.views), (masked << np.arange(P)).sum(1)]
        weight = noised.token_weight.numpy().astype(float) / P
        sums = (weight * values, (weight * values) ** 2, np.zeros_like(weight), weight, weight**2)
        return RowSums(*(value.sum(1).reshape(noised.views, -1).T for value in sums))

    def losses(self, noised: NoisedBatch, sample: Floats) -> Floats:
        """Per-sample losses [B], mean over views."""
        return self.rows(noised, sample).loss.mean(1)

    def of_masks(self, q: Floats) -> Floats:
        """l [samples, T, 2^P] for weights 1/q [T, 2^P or 1]."""
        return (self.tables * MASKS).sum(2)[:, None, :] / (P * q)

    def enumerate(self, t: Floats, rule: str = "bernoulli", schedule: MaskSchedule = SCHEDULE) -> tuple[Floats, Floats]:
        """E[l | x0, t] and E[l² | x0, t] of one view over all masks, [samples, T] each."""
        probability, q = mask_probabilities(t, rule, schedule)
        loss = self.of_masks(q[:, None])
        return (probability * loss).sum(2), (probability * loss**2).sum(2)

    def steeper(self) -> Toy:
        """Losses that differ much between rates, as the transformer's hardly do."""
        result = copy(self)
        result.tables = self.tables * 2.0 ** MASKS.sum(1)[None, :, None]
        return result

    def pair_product(self, t: Floats) -> Floats:
        """E[l₁ l₂ | x0, t] of complementary Bernoulli views [samples, T], over all pairs of masks."""
        q = SCHEDULE.mask_probability(t)
        both = np.maximum(2 * q - 1, 0)
        only = np.minimum(q, 1 - q)
        none = np.maximum(1 - 2 * q, 0)
        total = (self.tables * MASKS).sum(2)
        result = np.zeros((len(self.tables), len(t)))
        for first in range(2**P):
            for second in range(2**P):
                cases = MASKS[first] + 2 * MASKS[second]
                probability = np.prod([[none, only, only, both][case] for case in cases], axis=0)
                product = total[:, first] * total[:, second]
                result += product[:, None] * probability / (P * q) ** 2
        return result


def mask_probabilities(t: Floats, rule: str, schedule: MaskSchedule = SCHEDULE) -> tuple[Floats, Floats]:
    """(probability of every mask [T, 2^P], q [T])"""
    count = MASKS.sum(1)
    if rule != "bernoulli":
        wanted = schedule.rate(t) * P
        chosen = np.minimum(
            {"exact_count": np.floor(wanted) + 1, "rounded_count": np.maximum(np.rint(wanted), 1)}[rule], P
        )
        ways = np.array([np.count_nonzero(count == number) for number in range(P + 1)])
        return (count[None, :] == chosen[:, None]) / ways[count][None, :], chosen / P
    q = schedule.mask_probability(t)
    return q[:, None] ** count * (1 - q[:, None]) ** (P - count), q


def midpoints(num: int = 20000) -> Floats:
    return (np.arange(num) + 0.5) / num


def exact_mean(toy: Toy, rule: str = "bernoulli") -> float:
    """L = ∫ E[l | t] dt."""
    return float(toy.enumerate(midpoints(), rule)[0].mean())


def exact_variance(toy: Toy, sampler: TSampler, rule: str = "bernoulli") -> float:
    """∫ E[l² | t] / p(t) dt − L²."""
    t = midpoints()
    mean, square = toy.enumerate(t, rule)
    return float((square.mean(0) / sampler.density(t)).mean() - mean.mean() ** 2)


def clean_batch(size: int) -> CleanBatch:
    return CleanBatch(
        tokens=torch.full((size, P), 5),
        eligible=torch.ones(size, P, dtype=torch.bool),
        delimiters=torch.zeros(size, P, dtype=torch.bool),
        lengths=torch.full((size,), P),
        positions=torch.arange(size),
        sample_ids=torch.arange(size),
    )


def shapes() -> SampleShapes:
    return SampleShapes.of(np.array([P]), np.array([0]))
