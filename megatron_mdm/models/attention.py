"""Attention on torch's fused kernels, in place of megatron-core's S × S DotProductAttention."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mdm.models.cache import Window

# In bf16 on CPUs, torch 2.13's fused kernel is up to 8 times slower, in its backward pass, than plain matrix products
# (64 rows of 44: 28 against 6 ms; 2 of 1024: 59 against 37 ms); beyond this length the scores take too much memory.
EXPLICIT_LENGTH = 1024


class CoreAttention(MegatronModule):
    """Bidirectional or causal. A core_attention for megatron-core's SelfAttention (signature:
    megatron/core/transformer/attention.py)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        recompute: bool = False,
        causal: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number, self.softmax_scale, self.causal = layer_number, softmax_scale, causal
        self.recompute = recompute  # in the backward pass, instead of keeping scores

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Window | None, **_: Any
    ) -> Tensor:
        """query [S, B, heads, D]; key, value [S, B, kv heads, D]; attention_mask bool, broadcastable to
        [B, heads, S, S], True where a query may look, or None; or, where B is 1, int64 [1, K]: the lengths of the
        segments that make the row, each of which sees itself only; or the window of a cache that these keys and values
        go into and whose others are looked at, too. Returns [S, B, heads · D]."""
        if isinstance(attention_mask, Window):
            window = attention_mask
            key, value = window.cache.write(self.layer_number, window.positions, key, value)
            return self._attend(query, key, value, window.visible(self.causal))
        if self.causal and attention_mask is not None and attention_mask.dim() > 2:
            attention_mask = causal_part(attention_mask)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._attend, query, key, value, attention_mask, use_reentrant=False, preserve_rng_state=False
            )
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None and attention_mask.dim() == 2:
            return self._attend_segments(query, key, value, attention_mask[0])
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        return self._scores_times_values(query, key, value, attention_mask).permute(2, 0, 1, 3).flatten(2)

    def _attend_segments(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """Segment by segment: no product, no score and no rounding of one depends on another."""
        if query.device.type == "cuda" and query.dtype != torch.float32:
            return _varlen_attention(query, key, value, lengths, self.softmax_scale, self.causal)
        sizes = lengths.tolist()
        parts = zip(*(x.permute(1, 2, 0, 3).split(sizes, dim=2) for x in (query, key, value)))
        context = torch.cat([self._scores_times_values(*part, None) for part in parts], dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _scores_times_values(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, heads, S, D] of queries → the same of contexts."""
        is_causal = self.causal and attention_mask is None
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and len(query[0, 0]) <= EXPLICIT_LENGTH:
            return explicit_attention(query, key, value, attention_mask, self.softmax_scale, is_causal)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None, is_causal: bool
) -> Tensor:
    """torch's variable-length kernel over [T, 1, heads, D] and segment lengths [K]. Not run by the authors: it needs
    CUDA and 16-bit numbers (torch/nn/attention/varlen.py, torch 2.10 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    query, key, value = (x.squeeze(1) for x in (query, key, value))
    several, window = query.shape[1] != key.shape[1], (-1, 0) if is_causal else (-1, -1)
    context = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, enable_gqa=several
    )
    return context.flatten(1).unsqueeze(1)


def causal_part(attention_mask: Tensor) -> Tensor | None:
    """What a mask leaves visible on and before each query. Where it only hides padding on the right, that is what no
    query of a sample would look at anyway: None, which kernels exploit."""
    return attention_mask.tril() if attention_mask.shape[-2] > 1 else None


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float | None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale) v with the scores in memory. [B, heads, S, D] each; mask as above. is_causal: in place of a
    mask."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    query, key, value = (x.contiguous() for x in (query, key, value))  # batched products copy slowly themselves
    scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if is_causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ value
