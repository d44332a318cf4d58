"""Attention on torch's fused kernels, in place of megatron-core's S × S DotProductAttention."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mdm.models.cache import Window
from megatron_mdm.models.kernel_memory import EXPLICIT_LENGTH
from megatron_mdm.models.rotary import Rotation, rotate

_TYPE_NAMES = {torch.float64: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class AttentionInputs(NamedTuple):
    """What a layer's attention is given beside queries, keys and values: megatron-core hands it on unseen."""

    # bool, broadcastable to [B, heads, S, S], True where a query may look, or None; or, where B is 1, int64 [1, K]: the
    # lengths of the segments that make the row, each of which sees itself only; or the window of a cache that these
    # keys and values go into and whose others are looked at, too.
    seen: Tensor | Window | None
    rotation: Rotation  # of the queries' and keys' positions


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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionInputs, **_: Any) -> Tensor:
        """query [S, B, heads, D]; key, value [S, B, kv heads, D]. Returns [S, B, heads · D]."""
        seen, rotation = attention_mask
        heads_first = query.device.type == "cpu"
        query, key = rotate(query, rotation, heads_first), rotate(key, rotation, heads_first)
        if isinstance(seen, Window):
            key, value = seen.cache.write(self.layer_number, seen.positions, key, value)
            return self._attend(query, key, value, seen.visible(self.causal))
        if self.causal and seen is not None and seen.dim() > 2:
            seen = causal_part(seen)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._attend, query, key, value, seen, use_reentrant=False, preserve_rng_state=False)
        return self._attend(query, key, value, seen)

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
        if query.device.type == "cpu" and key.shape[2] <= EXPLICIT_LENGTH[_TYPE_NAMES[query.dtype]]:
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
    """softmax(q kᵀ · scale) v with the scores in memory. [B, heads, S, D] each; attention_mask bool, True where a query
    may look. is_causal: in place of a mask."""
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if is_causal:
        attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    hidden = None if attention_mask is None else ~attention_mask
    context = _ExplicitAttention.apply(
        *(x.reshape(rows * heads, -1, width) for x in (query, key, value)),
        hidden,
        scale or width**-0.5,
        (rows, heads),
    )
    return context.view(rows, heads, length, width)


class _ExplicitAttention(torch.autograd.Function):
    """query, key, value [B · heads, S, D]; hidden bool, broadcastable to [B, heads, S, S]. Keeps the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float, shape: tuple[int, int]
    ) -> Tensor:
        scores = torch.bmm(query * scale, key.transpose(1, 2))
        if hidden is not None:
            scores.view(*shape, *scores.shape[1:]).masked_fill_(hidden, torch.finfo(scores.dtype).min)
        probabilities = torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return torch.bmm(probabilities, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, probabilities = ctx.saved_tensors
        of_value = torch.bmm(probabilities.transpose(1, 2), gradient)
        of_scores = torch.bmm(gradient, value.transpose(1, 2))
        torch._softmax_backward_data(of_scores, probabilities, -1, probabilities.dtype, grad_input=of_scores)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        return of_query, of_key, of_value, None, None, None
