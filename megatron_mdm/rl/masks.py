"""Masks of a completion at a mask rate: a row and its partner, as functions of uniform numbers by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import Bernoulli, Bools, MaskDesign


class Pair(NamedTuple):
    """Two rows of a completion; with one view the first is used alone."""

    masked: Bools  # [2, L]
    t: Floats  # [2]
    q: Floats  # [2]


PairRule = Callable[[MaskDesign, Floats, int, float], Pair]  # (design, uniforms [L], P, t) → rows of L positions


def mirror(design: MaskDesign, uniforms: Floats, scored: int, t: float) -> Pair:
    """A mask by the design's rule and its mirror image, at the same rate (method.md, Section 4: U < q and U > 1 − q).

    The first `scored` of the positions are masked by the rule; those of the tail independently, as probably.
    """
    q = float(design.rule.probability(np.array(t), np.array(float(scored)), design.schedule))
    parts = (design.rule.draw(uniforms[:scored], q), Bernoulli().draw(uniforms[scored:], q))
    return Pair(np.concatenate(parts, axis=1), np.full(2, t), np.full(2, q))


def bernoulli_complement(design: MaskDesign, uniforms: Floats, scored: int, t: float) -> Pair:
    """U < q and U ≥ q, at rates t and 1 − t. Rates nearer to 0 or 1 than 1/(P + 1) are moved there, so that no token
    weighs more than about P + 1; the end pieces of ∫ f(t) dt then are rectangles."""
    end = 1.0 / (scored + 1)
    t = min(max(t, end), 1.0 - end)
    q = float(design.schedule.mask_probability(np.array(t)))
    masked = uniforms < q
    return Pair(np.stack([masked, ~masked]), np.array([t, 1.0 - t]), np.array([q, 1.0 - q]))


def counted_complement(design: MaskDesign, uniforms: Floats, scored: int, t: float) -> Pair:
    """A random subset of M = ⌊r(t) (P + 1)⌋ positions and the others, either of which may be empty.

    M is uniform on 0 … P, so a token weighs 1/q with q = M/(P + 1), (P − M)/(P + 1): E[Σ_M ℓ (P + 1)/M] = Σ_m (1/m)
    E[Σ_M ℓ | M = m], the bound, of either row (ESPO's grid, its espo_trainer.py).
    """
    count = min(int(design.schedule.rate(np.array(t)) * (scored + 1)), scored)
    masked = np.concatenate(
        [design.rule.draw(uniforms[:scored], count / scored)[0], uniforms[scored:] < count / scored]
    )
    q = np.array([count, scored - count]) / (scored + 1)
    return Pair(np.stack([masked, ~masked]), np.array([t, 1.0 - t]), q)


COMPLEMENTS: dict[str, PairRule] = {  # by diffusion.masking
    "bernoulli": bernoulli_complement,
    "exact_count": counted_complement,
    "rounded_count": counted_complement,
}


def pair_rule(partner: str, masking: str) -> PairRule:
    """rl.partner and diffusion.masking → the rule."""
    return {"mirror": mirror, "complement": COMPLEMENTS[masking]}[partner]
