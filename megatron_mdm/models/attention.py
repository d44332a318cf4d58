"""Bidirectional attention on torch's fused kernels, in place of megatron-core's S × S DotProductAttention."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# In bf16 on CPUs, torch 2.13's fused kernel is up to 8 times slower, in its backward pass, than plain matrix products
# (64 rows of 44: 28 against 6 ms; 2 of 1024: 59 against 37 ms); beyond this length the scores take too much memory.
EXPLICIT_LENGTH = 1024


class BidirectionalAttention(MegatronModule):
    """A core_attention for megatron-core's SelfAttention (signature: megatron/core/transformer/attention.py)."""

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, recompute: bool = False, **_: Any
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.recompute = recompute  # in the backward pass, instead of keeping scores

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [S, B, heads, D]; key, value [S, B, kv heads, D]; attention_mask bool, broadcastable to
        [B, heads, S, S], True where a query may look, or None. Returns [S, B, heads · D]."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._attend, query, key, value, attention_mask, use_reentrant=False, preserve_rng_state=False
            )
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and len(query[0, 0]) <= EXPLICIT_LENGTH:
            context = explicit_attention(query, key, value, attention_mask, self.softmax_scale)
        else:
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attention_mask,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(q kᵀ · scale) v with the scores in memory. [B, heads, S, D] each; mask as above."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    query, key, value = (x.contiguous() for x in (query, key, value))  # batched products copy slowly themselves
    scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ value
