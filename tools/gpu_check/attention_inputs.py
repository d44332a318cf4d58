"""Queries, keys and values for the checks of attention, and what attention has to give, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.batch import padded_rows
from megatron_mdm.engine.inputs import InputLayout, logits_inputs
from megatron_mdm.models.attention import Visibility, explicit_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Heads(NamedTuple):
    """How many, and how wide."""

    query: int
    key: int
    width: int

    def draw(self, *shape: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Query, key and value [*shape, heads, width], normal, which want gradients."""
        torch.manual_seed(0)
        shapes = [(*shape, heads, self.width) for heads in (self.query, self.key, self.key)]
        return [_normal(one, device).to(dtype).requires_grad_() for one in shapes]


def visibility(lengths: Sequence[int], causal: bool, pack: bool, device: str) -> Visibility:
    """What tokens of rows of these lengths see, the rows packed into one or padded to the longest."""
    rows = torch.tensor(lengths)
    width = int(rows.max())
    nothing = torch.zeros(len(rows), width, dtype=torch.int64)
    inputs = logits_inputs(nothing, padded_rows(rows, width, causal), nothing.bool())
    return Visibility(InputLayout(pack=pack)(inputs).to(torch.device(device)))


def with_gradients(attend: Attend, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The contexts, and the gradients of query, key and value for drawn gradients of the contexts."""
    context = attend(*inputs)
    direction = _direction(context.shape, context.dtype, context.device)
    return [context.detach(), *torch.autograd.grad(context, list(inputs), direction)]


@lru_cache(maxsize=2)  # of a case and of what it is compared with: passes that are timed do not draw it
def _direction(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    return _normal(shape, device).to(dtype)


def _normal(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """fp32, drawn on the device: on the host, numbers for large heads take longer than their attention."""
    return torch.randn(shape, device=device)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[B, heads, S, D] each: the scores in memory, in fp64. mask: True where a query may look."""
    return explicit_attention(query, key, value, mask, None, causal)
