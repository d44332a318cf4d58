"""A tiny policy whose log-probabilities and their gradients are known under every mask, and sums over all noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.config.schema import DiffusionConfig, RlConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import Bools
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, TSampler, UniformSampler
from megatron_mdm.rl.noise import RlNoise, Rows, Shape

PROMPT = 2
VOCAB = 4
HIDDEN = 3
EPSILON = 0.1  # of Bernoulli masks: bounds their weights 1/q
UNIFORM = UniformSampler()
STEEP = TabulatedSampler(np.array([3.0, 0.5, 1.0, 1.5]))  # its cells are quarters of [0, 1]


def parameters(size: int, seed: int) -> Tensor:
    """θ of a policy of `size` tokens, [n] float64."""
    number = (VOCAB + 1) * HIDDEN + size * size + size * HIDDEN + HIDDEN * VOCAB
    return torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(theta: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """tokens [L], masked [K, L] → log p of every token in its place, [K, L], given those that are shown."""
    size = len(tokens)
    shapes = ((VOCAB + 1, HIDDEN), (size, size), (size, HIDDEN), (HIDDEN, VOCAB))
    numbers = [int(np.prod(shape)) for shape in shapes]
    embedding, mix, places, head = (
        part.reshape(shape) for part, shape in zip(theta.split(numbers), shapes, strict=True)
    )
    shown = embedding[torch.where(masked, VOCAB, tokens)]  # [K, L, H]
    logits = torch.tanh(mix @ shown + places) @ head
    return logits.log_softmax(2)[:, torch.arange(size), tokens]


class Toy(NamedTuple):
    """Of one completion: what every mask of prompt and completion gives."""

    num_scored: int  # P
    table: Floats  # [2^L, P, 1 + n]: ℓ and its gradient

    def of(self, masked: Bools) -> Floats:
        """masked [K, L] → [K, P, 1 + n], also where a token is shown."""
        return self.table[masked @ (1 << np.arange(masked.shape[1]))]

    @property
    def shape(self) -> Shape:
        return Shape(PROMPT, self.num_scored, self.num_scored)

    @property
    def totals(self) -> Floats:
        """[2^P, 1 + n]: Σ over masked tokens of the completion, the prompt shown."""
        masks = all_masks(self.num_scored)
        hidden = np.concatenate([np.zeros((len(masks), PROMPT), dtype=bool), masks], axis=1)
        return (self.of(hidden) * masks[:, :, None]).sum(1)

    @property
    def by_count(self) -> Floats:
        """[P + 1, 1 + n]: the mean of totals over masks of each count."""
        counts = all_masks(self.num_scored).sum(1)
        return np.stack([self.totals[counts == count].mean(0) for count in range(self.num_scored + 1)])

    @property
    def bound(self) -> Floats:
        """B and its gradient, [1 + n]: Σ_m (1/m) E[Σ_M ℓ | m masked]."""
        return sum(self.by_count[count] / count for count in range(1, self.num_scored + 1))

    def bernoulli(self, q: float, weight_of_count: Callable[[Floats], Floats]) -> Floats:
        """E[weight(|M|) Σ_M ℓ] where each token is masked with probability q, [1 + n]."""
        counts = all_masks(self.num_scored).sum(1).astype(float)
        probability = q**counts * (1 - q) ** (self.num_scored - counts)
        return (probability * weight_of_count(counts)) @ self.totals


@cache
def toy(num_scored: int = 5, policy: int = 0, completion: int = 0) -> Toy:
    size = PROMPT + num_scored
    theta = parameters(size, policy)
    tokens = torch.from_numpy(np.random.default_rng(completion).integers(0, VOCAB, size))
    masks = torch.from_numpy(all_masks(size))
    values = log_probs(theta.requires_grad_(), tokens, masks)[:, PROMPT:]
    gradients = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in values.flatten()]
    table = torch.cat([values[:, :, None], torch.stack(gradients).reshape(*values.shape, -1)], 2)
    return Toy(num_scored, table.detach().numpy())


def all_masks(size: int) -> Bools:
    """[2^size, size]: the bits of 0, 1, …"""
    return (np.arange(2**size)[:, None] >> np.arange(size)) & 1 == 1


def settings(diffusion: dict[str, Any] | None = None, **rl: Any) -> tuple[RlConfig, DiffusionConfig]:
    return (
        RlConfig(num_generations=2, prompts_per_rollout=4, **rl),
        DiffusionConfig(**{"epsilon": EPSILON, **(diffusion or {})}),
    )


def noise_of(rl: RlConfig, diffusion: DiffusionConfig, sampler: TSampler = UNIFORM, seed: int = 3) -> RlNoise:
    return RlNoise(rl, diffusion, sampler, seed, rl.num_completions)


def bernoulli_numbers(size: int, thresholds: list[float]) -> Iterator[tuple[Floats, float]]:
    """Numbers [size] on all sides of the thresholds, and their probability."""
    edges = np.unique([0.0, *thresholds, 1.0])
    cells = list(zip((edges[1:] + edges[:-1]) / 2, np.diff(edges)))
    for chosen in itertools.product(cells, repeat=size):
        yield np.array([value for value, _ in chosen]), float(np.prod([width for _, width in chosen]))


def ordered_numbers(size: int) -> Iterator[tuple[Floats, float]]:
    """Numbers [size] in every order."""
    orders = list(itertools.permutations(range(size)))
    for order in orders:
        yield (np.array(order) + 0.5) / size, 1.0 / len(orders)


def numbers_at(noise: RlNoise, masking: str, size: int, t: float) -> Iterator[tuple[Floats, float]]:
    """All that tells masks at a rate apart."""
    if masking != "bernoulli":
        return ordered_numbers(size)
    complement = noise.rl.pairing == "complement"
    end = 1 / (size + 1) if complement else 0.0  # complementary rates stay away from the ends
    q = EPSILON + (1 - EPSILON) * min(max(t, end), 1 - end)
    return bernoulli_numbers(size, [q] if complement or not noise.design.complementary else [q, 1 - q])


def rates(noise: RlNoise, masking: str, size: int) -> Iterator[tuple[float, float, float]]:
    """(t, importance weight, probability) of a rule exact for what depends on t as masks of `size` tokens do: constant
    between the rates at which counts change, or a polynomial between the kinks of pairs of Bernoulli masks."""
    low, high = noise.rl.rate_range
    complement = noise.rl.pairing == "complement"
    if masking == "exact_count":
        kinks = np.arange(size + 2) / (size + complement)
    elif complement:
        kinks = np.array([1.0, size]) / (size + 1)
    else:
        kinks = np.full(1, (0.5 - EPSILON) / (1 - EPSILON)) if noise.design.complementary else np.empty(0)
    edges = np.union1d((np.clip(kinks, low, high) - low) / (high - low), [0.0, 1.0])
    if isinstance(noise.sampler, TabulatedSampler):
        cumulative = noise.sampler.cumulative
        edges = np.union1d(np.interp(edges, np.linspace(0, 1, len(cumulative)), cumulative), cumulative)
    nodes, weights = np.polynomial.legendre.leggauss(1 if masking == "exact_count" else size // 2 + 1)
    for lower, upper in itertools.pairwise(edges):
        quantile, importance = noise.sampler.quantile(lower + (upper - lower) * (nodes + 1) / 2)
        weight = importance if noise.rl.importance_weight else np.ones_like(importance)
        yield from zip(low + (high - low) * quantile, weight, weights / 2 * (upper - lower))


def expectation(noise: RlNoise, masking: str, toy: Toy, of: Callable[[Rows], Floats]) -> Floats:
    """E[of(rows)] over the rate and all masks. With repeats: where `of` is a sum over them."""
    repeats = noise.design.repeats
    total: Any = 0.0
    for t, weight, probability in rates(noise, masking, toy.num_scored):
        for numbers, share in numbers_at(noise, masking, toy.num_scored, t):
            rows = noise.rows_of([numbers] * repeats, toy.shape, np.full(repeats, t), np.full(repeats, weight))
            total = total + probability * share * of(rows)
    return np.asarray(total)
