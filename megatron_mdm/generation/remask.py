"""Which candidates of a denoising step are kept, and how many; the others stay masked.

LLaDA: generate.py of ML-GSAI/LLaDA. Dream: generation_utils.py of HKUNLP/Dream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.generation.candidates import Candidates, parts


class Step(NamedTuple):
    """How much of a block one of its steps commits."""

    count: int  # type: ignore[assignment]  # tokens of every row; hides tuple.count
    share: float  # of the masks that are left


class Ranking(NamedTuple):
    """The order in which candidates of R rows with B positions each may be committed."""

    scores: Tensor  # [R, B] float64; −inf where nothing is masked
    masked: Tensor  # [R, B] bool
    held_back: Tensor  # [R, B] bool: committed only where nothing else is left


def low_confidence(found: Candidates, _: Tensor) -> Tensor:
    """LLaDA's: the candidate's probability in the model's own softmax, whatever it was drawn from."""
    return _probability(found.tokens, found.logits)


def random(_: Candidates, uniforms: Tensor) -> Tensor:
    """LLaDA's random, Dream's origin: no confidence but chance."""
    return uniforms


def maskgit_plus(found: Candidates, _: Tensor) -> Tensor:
    """Dream's: the candidate's probability in the distribution that it was drawn from."""
    return _probability(found.tokens, found.drawn_from)


def topk_margin(found: Candidates, _: Tensor) -> Tensor:
    """Dream's: the two greatest probabilities' difference, whichever token was drawn."""
    best = found.drawn_from.double().softmax(1).topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def entropy(found: Candidates, _: Tensor) -> Tensor:
    """Dream's: Σ p log(p + 1e-10), the negative entropy of the distribution that the candidate was drawn from."""
    probabilities = found.drawn_from.double().softmax(1)
    return (probabilities * torch.log(probabilities + 1e-10)).sum(1)


def _probability(tokens: Tensor, logits: Tensor) -> Tensor:
    return torch.cat([_of_part(tokens[part], logits[part].double()) for part in parts(logits)])


def _of_part(tokens: Tensor, logits: Tensor) -> Tensor:
    return (logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)).exp()


def most_confident(ranking: Ranking, count: float) -> Tensor:
    """The `count` best scores of each row, as far as it has masks, [R, B] bool; of equal ones, the first."""
    order = ranking.scores.argsort(dim=1, descending=True, stable=True)
    last = (ranking.held_back | ~ranking.masked).gather(1, order).byte()
    order = order.gather(1, last.argsort(dim=1, stable=True))
    return torch.zeros_like(ranking.masked).scatter_(1, order[:, : int(count)], True) & ranking.masked


def by_chance(ranking: Ranking, share: float) -> Tensor:
    """Each mask by itself with probability `share`, [R, B] bool."""
    return ranking.masked & (ranking.scores < share)


def confident_enough(ranking: Ranking, count: float, threshold: float) -> Tensor:
    """All whose confidence is at least the threshold, and at least `count`, [R, B] bool (Fast-dLLM)."""
    return most_confident(ranking, count) | (ranking.scores >= threshold)


class Rule(NamedTuple):
    """One way of choosing what is committed."""

    # (candidates, uniforms [N]) → [N] float64, the greater the earlier
    confidence: Callable[[Candidates, Tensor], Tensor]
    is_probability: bool = False  # the confidence is the candidate's probability
    is_chance: bool = False  # the confidence is a uniform number
    amount: Callable[[Step], float] = attrgetter("count")  # what select is told of a step; 0: it commits nothing
    select: Callable[[Ranking, float], Tensor] = most_confident


REMASKING: dict[str, Rule] = {
    "low_confidence": Rule(low_confidence, is_probability=True),
    "random": Rule(random, is_chance=True),
    "maskgit_plus": Rule(maskgit_plus, is_probability=True),
    "topk_margin": Rule(topk_margin),
    "entropy": Rule(entropy),
    "origin": Rule(random, is_chance=True, amount=attrgetter("share"), select=by_chance),
}


def linear(num_masked: int, num_steps: int, _: float) -> list[Step]:
    """LLaDA's: ⌊masked/steps⌋ a step, the first (masked mod steps) steps one more."""
    base, extra = divmod(num_masked, num_steps)
    return _steps([base + (step < extra) for step in range(num_steps)])


def cosine(num_masked: int, num_steps: int, _: float) -> list[Step]:
    """MaskGIT's, which MMaDA uses for images: ⌊masked · cos(π/2 · s/steps)⌋ stay masked after step s, but each step
    that can commits at least one: few at first, most at the end."""
    counts = []
    left = num_masked
    for step in range(1, num_steps + 1):
        still = math.floor(num_masked * math.cos(math.pi / 2 * step / num_steps) + 1e-9) if step < num_steps else 0
        counts.append(left - max(0, min(still, left - 1)))
        left -= counts[-1]
    return _steps(counts)


def epsilon(num_masked: int, num_steps: int, eps: float) -> list[Step]:
    """Dream's: times t fall evenly from 1 to eps; the step from t to s commits the share 1 − s/t of the masks left,
    cut off to a whole number, and the last step all. In float32, as there, where rounding decides some counts."""
    times = torch.linspace(1.0, eps, num_steps + 1)
    steps = []
    left = num_masked
    for share in 1 - times[1:-1] / times[:-2]:
        steps.append(Step(int(left * share), float(share)))
        left -= steps[-1].count
    return [*steps, Step(left, 1.0)]


def _steps(counts: list[int]) -> list[Step]:
    """Steps of these counts, each with its share of the masks that are left."""
    left = [sum(counts[index:]) for index in range(len(counts))]
    return [Step(count, count / masked if masked else 0.0) for count, masked in zip(counts, left)]


# (masked positions of a block, steps, eps) → what each step commits, all of them together
COMMIT_SCHEDULES: dict[str, Callable[[int, int, float], list[Step]]] = {
    "linear": linear,
    "cosine": cosine,
    "epsilon": epsilon,
}
