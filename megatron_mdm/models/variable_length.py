"""torch's variable-length attention (torch/nn/attention/varlen.py), by the arguments that the installed version takes.

torch 2.12 takes a scale, a window and fewer heads of keys than of queries; 2.11 not the last, older ones less.
What is lacking is done in its place: the scale is multiplied into the queries, heads are repeated, causal segments run
one by one. It needs CUDA and 16-bit numbers; tools/gpu_check compares it with a loop over the segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from megatron_mdm.batch import SegmentBounds

# (query, key, value [T, heads, D], bounds of queries and of keys [K + 1] int32, the longest of each, …) → [T, heads, D]
Kernel = Callable[..., Any]


def installed_kernel() -> Kernel | None:
    """torch's varlen_attn; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Kernel, varlen_attn)


class VariableLength:
    """A kernel, and how to ask it for what it has no argument for."""

    def __init__(self, kernel: Kernel) -> None:
        takes = inspect.signature(kernel).parameters
        self.kernel = kernel
        self.takes_scale = "scale" in takes
        self.takes_fewer_keys = "enable_gqa" in takes
        self.causal: dict[str, Any] = {}  # the argument that makes it causal; empty: it has none
        if "window_size" in takes:
            self.causal = {"window_size": (-1, 0)}
        elif "is_causal" in takes:
            self.causal = {"is_causal": True}

    @property
    def has_causal(self) -> bool:
        return bool(self.causal)

    def describe(self) -> str:
        """What is done instead of handing it over, for a line of the log; empty: nothing."""
        instead = {
            "the scale is multiplied into the queries": not self.takes_scale,
            "heads of keys are repeated": not self.takes_fewer_keys,
            "causal segments run one by one": not self.has_causal,
        }
        return ", ".join(what for what, done in instead.items() if done)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, segments: SegmentBounds, causal: bool, scale: float | None
    ) -> Tensor:
        """query [T, 1, heads, D], key and value [T, 1, kv heads, D] of segments of one row → [T, 1, heads · D]. causal:
        only where has_causal. scale: None for 1/√D."""
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        named = dict(self.causal) if causal else {}
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and self.takes_fewer_keys:
            named["enable_gqa"] = True
        elif groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if scale is not None and self.takes_scale:
            named["scale"] = scale
        elif scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        starts = segments.starts
        longest = segments.longest
        context = self.kernel(query, key, value, starts, starts, longest, longest, **named)
        return cast(Tensor, context).flatten(1).unsqueeze(1)
