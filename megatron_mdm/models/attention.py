"""Bidirectional attention on torch's fused kernels, in place of megatron-core's S × S DotProductAttention."""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class BidirectionalAttention(MegatronModule):
    """A core_attention for megatron-core's SelfAttention (signature: megatron/core/transformer/attention.py)."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [S, B, heads, D]; key, value [S, B, kv heads, D]; attention_mask bool, broadcastable to
        [B, heads, S, S], True where a query may look, or None. Returns [S, B, heads · D]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)
