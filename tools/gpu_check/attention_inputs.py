"""Queries, keys and values for the checks of attention, and what attention has to give, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        """Query, key and value [*shape, heads, width], normal, the same on every device, which want gradients."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(*shape, heads, self.width, generator=generator).to(device, dtype).requires_grad_()
            for heads in (self.query, self.key, self.key)
        ]


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
    direction = torch.randn(context.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(context, list(inputs), direction.to(context.device, context.dtype))
    return [context.detach(), *gradients]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[B, heads, S, D] each: the scores in memory, in fp64. mask: True where a query may look."""
    return explicit_attention(query, key, value, mask, None, causal)
