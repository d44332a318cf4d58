"""What each masked position would become: a token drawn from the model's distribution, as settings bend it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    logits: Tensor, temperature: float, top_p: float, top_k: int, mask_id: int | None, gumbel_uniforms: Tensor
) -> Candidates:
    """logits [N, V] float32; gumbel_uniforms [N, V], not read at temperature 0, which takes the most likely token.
    mask_id: the mask's place among the V; None: it is not one of them.

    Where the mask is the only token that is kept, the most likely other one is the candidate.
    """
    drawn_from = truncated(logits.double() / temperature if temperature else logits, top_p, top_k)
    noisy = drawn_from + gumbel_noise(gumbel_uniforms.to(logits.device)) if temperature else drawn_from
    if mask_id is None:
        return Candidates(noisy.argmax(1), logits, drawn_from)
    best, tokens = without(noisy, mask_id).max(1)
    nothing = best == float("-inf")
    if nothing.any():
        tokens[nothing] = without(logits[nothing], mask_id).argmax(1)
    return Candidates(tokens, logits, drawn_from)


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
    return -torch.log(-torch.log(uniforms.double()))
