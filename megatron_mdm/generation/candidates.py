"""What each masked position would become: a token drawn from the model's distribution, as settings bend it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.generation.noise import TokenUniforms

# Numbers of a table [N, V] that are worked on at a time, in float64: on a CPU what its caches hold
ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 21}


class Candidates(NamedTuple):
    """Candidates for N masked positions. In both tables of logits the mask is a token like others, but never a
    candidate."""

    tokens: Tensor  # [N] int64
    logits: Tensor  # [N, V] float32: the model's, after guidance
    drawn_from: Tensor  # [N, V]: logits / temperature of the tokens that top_p and top_k keep, −inf elsewhere

    def without(self, *token_ids: int) -> Candidates:
        """The same candidates, as if the model gave these tokens no probability."""
        return Candidates(self.tokens, without(self.logits, *token_ids), without(self.drawn_from, *token_ids))


def draw(
    logits: Tensor, temperature: float, top_p: float, top_k: int, mask_id: int | None, uniforms: TokenUniforms
) -> Candidates:
    """logits [N, V] float32; uniforms: not asked at temperature 0, which takes the most likely token. mask_id: the
    mask's place among the V; None: it is not one of them.

    Where the mask is the only token that is kept, the most likely other one is the candidate.
    """
    drawn_from = truncated(logits.double().div_(temperature) if temperature else logits, top_p, top_k)
    found = [
        _best(drawn_from[part], uniforms(part).to(logits.device) if temperature else None, mask_id)
        for part in parts(logits)
    ]
    best, tokens = (torch.cat(of_parts) for of_parts in zip(*found))
    if mask_id is None:
        return Candidates(tokens, logits, drawn_from)
    nothing = best == float("-inf")
    if nothing.any():
        tokens[nothing] = without(logits[nothing], mask_id).argmax(1)
    return Candidates(tokens, logits, drawn_from)


def _best(drawn_from: Tensor, uniforms: Tensor | None, mask_id: int | None) -> tuple[Tensor, Tensor]:
    """(values, tokens) [n] of the greatest of [n, V], with Gumbel noise where there are uniforms; never the mask's."""
    if uniforms is None:
        noisy = drawn_from if mask_id is None else drawn_from.clone()
    else:
        noisy = gumbel_noise(uniforms).add_(drawn_from)
    if mask_id is not None:
        noisy[:, mask_id] = float("-inf")
    return noisy.max(1)


def parts(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of [N, V], at least one, so that what is made of a part takes little memory."""
    size = max(ELEMENTS[logits.device.type] // logits.shape[1], 1)
    for start in range(0, max(len(logits), 1), size):
        yield slice(start, start + size)


def without(logits: Tensor, *token_ids: int) -> Tensor:
    """A copy of logits [N, V] in which these tokens have no probability."""
    result = logits.clone()
    result[:, list(token_ids)] = float("-inf")
    return result


def truncated(logits: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """logits [N, V] with −inf but for the most likely tokens: the fewest that hold more than top_p of the probability,
    and of these the top_k most likely (0: all). top_p 1 keeps all. As Dream's top_p_logits and top_k_logits."""
    if top_p < 1.0:
        ordered, ids = logits.sort(1, descending=True)
        removed = (ordered.softmax(1).cumsum(1) > top_p).roll(1, 1)  # those before it hold more
        removed[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter_(1, ids, removed), float("-inf"))
    if 0 < top_k < logits.shape[1]:
        worst = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, float("-inf"))
    return logits


def gumbel_noise(uniforms: Tensor) -> Tensor:
    """Gumbel numbers from uniform ones, float64: argmax(logits + noise) samples the softmax."""
    return torch.log(uniforms.double()).neg_().log_().neg_()
