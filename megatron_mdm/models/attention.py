"""Attention on torch's fused kernels and our own, chosen by which token sees which, in place of megatron-core's S × S
DotProductAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mdm.batch import ModelInputs, SegmentBounds, Segments
from megatron_mdm.models.cache import Window
from megatron_mdm.models.equal_segments import EqualSegments
from megatron_mdm.models.kernel_memory import EXPLICIT_LENGTH
from megatron_mdm.models.rotary import Rotation, rotate
from megatron_mdm.models.variable_length import VariableLength, installed_kernel

_TYPE_NAMES = {torch.float64: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Visibility:
    """What the queries of a micro-batch see and where they stand. Made once, for all layers on a rank."""

    def __init__(self, inputs: ModelInputs, window: Window | None = None) -> None:
        """window: the inputs' tokens are those at its positions of longer rows, which the pattern is about."""
        self.pattern = inputs.pattern
        self.window = window
        self.length = inputs.tokens.shape[1]
        self.device = inputs.tokens.device
        self._segments = inputs.segments
        self.dropout_keys = None if inputs.dropout_keys is None else inputs.dropout_keys.t()  # [S, R]
        self.rotations: dict[torch.dtype, Rotation] = {}  # of its positions, by the type of numbers: the first block's

        positions = inputs.positions
        if window is not None:
            positions = window.positions
        elif positions is None:
            positions = self.pattern.positions(self.length)
        if positions is not None:
            positions = positions.to(self.device, non_blocking=True)
        self.positions = positions  # [R or 1, S]; None: 0 … S−1

    @cached_property
    def kind(self) -> str:
        """Of the pattern; "equal segments" where a single row's segments, two or more, are of one length."""
        if self.window is not None:
            return "dense"
        kind = self.pattern.kind
        if kind == "segments" and len(self.segments.sizes) > 1 and len(set(self.segments.sizes)) == 1:
            return "equal segments"
        return kind

    @cached_property
    def mask(self) -> Tensor | None:
        """bool, broadcastable to [R, heads, S, keys], True where a query may look; None: everywhere. Made when a kernel
        first asks for it."""
        if self.window is not None:
            return self.pattern.mask_of(self.window.positions, self.window.cache.width)
        mask = self.pattern.mask(self.length)
        return None if mask is None else mask.to(self.device, non_blocking=True)

    @cached_property
    def segments(self) -> SegmentBounds:
        """Of a pattern of segments in a single row."""
        return self._segments or SegmentBounds.of(cast(Segments, self.pattern).lengths[0])


class AttentionInputs(NamedTuple):
    """What a layer's attention is given beside queries, keys and values: megatron-core hands it on unseen."""

    visible: Visibility
    rotation: Rotation  # of the queries' and keys' positions


class CoreAttention(MegatronModule):
    """A core_attention for megatron-core's SelfAttention (signature: megatron/core/transformer/attention.py)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        recompute: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.recompute = recompute  # in the backward pass, instead of keeping scores

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionInputs, **_: Any) -> Tensor:
        """query [S, B, heads, D]; key, value [S, B, kv heads, D]. Returns [S, B, heads · D]."""
        visible, rotation = attention_mask
        heads_first = query.device.type == "cpu"
        query = rotate(query, rotation, heads_first)
        key = rotate(key, rotation, heads_first)
        if visible.window is not None:
            key, value = visible.window.cache.write(self.layer_number, visible.window.positions, key, value)
        return self._attend(query, key, value, visible)

    @torch.compiler.disable
    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility) -> Tensor:
        """Turned queries and keys → contexts. Not compiled: the kernels are fused by themselves, and what is visible is
        another thing in every micro-batch."""
        execute = executor(visible.kind, query.device.type, query.dtype)
        inputs = query, key, value, visible, self.softmax_scale
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(execute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return execute(*inputs)


# query, key and value [B, heads, S, D]; a mask as Visibility.mask; the scale, None for 1/√D; whether a query sees no
# later key, in place of a mask → contexts [B, heads, S, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None, bool], Tensor]
# query, key, value as CoreAttention.forward takes them, what is visible, the scale → what it returns
Executor = Callable[[Tensor, Tensor, Tensor, Visibility, float | None], Tensor]


def fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool
) -> Tensor:
    """A Kernel: torch's."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def explicit_while_short(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool
) -> Tensor:
    """A Kernel: scores in memory, but for so many keys that torch's fused kernel is better."""
    is_short = key.shape[2] <= EXPLICIT_LENGTH[_TYPE_NAMES[query.dtype]]
    return (explicit_attention if is_short else fused)(query, key, value, mask, scale, is_causal)


@dataclass(frozen=True)
class Rows:
    """An Executor: whole rows at once."""

    kernel: Kernel
    masked: bool = False
    causal: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float | None) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = visible.mask if self.masked else None
        return self.kernel(query, key, value, mask, scale, self.causal).permute(2, 0, 1, 3).flatten(2)


@dataclass(frozen=True)
class SegmentBySegment:
    """An Executor for segments of one row: no product, no score and no rounding of one depends on another."""

    kernel: Kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float | None) -> Tensor:
        causal = visible.pattern.causal
        sizes = list(visible.segments.sizes)
        parts = zip(*(x.permute(1, 2, 0, 3).split(sizes, dim=2) for x in (query, key, value)))
        context = torch.cat([self.kernel(q, k, v, None, scale, causal) for q, k, v in parts], dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)


@cache
def varlen() -> VariableLength | None:
    """torch's kernel for segments of one row, as far as the installed version's arguments go; None: it has none."""
    kernel = installed_kernel()
    return kernel and VariableLength(kernel)


def note_on_varlen() -> str:
    """What is done in the installed torch's place for segments of one row, in a line; empty: nothing."""
    kernel = varlen()
    if kernel is None:
        return f"torch {torch.__version__} has no variable-length attention: segments run one by one"
    done = kernel.describe()
    return f"torch {torch.__version__}'s variable-length attention lacks arguments of 2.12's: {done}" * bool(done)


def segments_by(kernel: VariableLength | None) -> Executor:
    """An Executor for segments of one row: torch's kernel where it can, else segment by segment."""

    def execute(query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float | None) -> Tensor:
        if kernel is None or (visible.pattern.causal and not kernel.has_causal):
            return SegmentBySegment(fused)(query, key, value, visible, scale)
        return kernel(query, key, value, visible.segments, visible.pattern.causal, scale)

    return execute


def variable_length(query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float | None) -> Tensor:
    """segments_by() the installed torch's kernel, which needs CUDA and 16-bit numbers."""
    return segments_by(varlen())(query, key, value, visible, scale)


ANY = "any"
# (a pattern's kind, device, type of numbers) → what runs it; see executor(). Code outside the package can add to it.
EXECUTORS: dict[tuple[str, str, torch.dtype | str], Executor] = {
    ("full", ANY, ANY): Rows(fused),
    ("full", "cpu", ANY): Rows(explicit_while_short),
    ("causal", ANY, ANY): Rows(fused, causal=True),
    ("causal", "cpu", ANY): Rows(explicit_while_short, causal=True),
    ("padded", ANY, ANY): Rows(fused, masked=True),
    ("padded", "cpu", ANY): Rows(explicit_while_short, masked=True),
    ("segments", ANY, ANY): SegmentBySegment(fused),
    ("segments", "cpu", ANY): SegmentBySegment(explicit_while_short),
    ("segments", "cuda", torch.bfloat16): variable_length,
    ("segments", "cuda", torch.float16): variable_length,
    ("equal segments", "cuda", torch.bfloat16): EqualSegments(fused, variable_length),
    ("equal segments", "cuda", torch.float16): EqualSegments(fused, variable_length),
    ("dense", ANY, ANY): Rows(fused, masked=True),  # the reference, by AttentionPattern.mask
    ("dense", "cpu", ANY): Rows(explicit_while_short, masked=True),
}


WIDER_KINDS = {"equal segments": ("segments",)}  # whose entries do for a kind, too


def executor(kind: str, device: str, dtype: torch.dtype) -> Executor:
    """The closest entry for a pattern of this kind; where it has none, that of a wider kind, at last of "dense"."""
    kinds = (kind, *WIDER_KINDS.get(kind, ()), "dense")
    keys = [(k, *where) for k in kinds for where in ((device, dtype), (device, ANY), (ANY, ANY))]
    return next(EXECUTORS[key] for key in keys if key in EXECUTORS)


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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        of_value = torch.bmm(probabilities.transpose(1, 2), gradient)
        of_scores = torch.bmm(gradient, value.transpose(1, 2))
        torch._softmax_backward_data(of_scores, probabilities, -1, probabilities.dtype, grad_input=of_scores)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        return of_query, of_key, of_value, None, None, None
