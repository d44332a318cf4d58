"""Kernels that only CUDA has, in plain operations."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from tests.cuda import memory


def install() -> None:
    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*arguments: Any, **named: Any) -> Tensor:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        return _by_segments(**{name: bound.arguments[name] for name in _READ})

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    varlen.varlen_attn = varlen_attn


def product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.mm(left, right, out_dtype=dtype)."""
    return torch.mm(left.to(dtype), right.to(dtype))


PLAIN = {torch.ops.aten.mm.dtype: product_in}  # operations that have no kernel on the CPU
_READ = ("query", "key", "value", "cu_seq_q", "max_q", "scale", "window_size", "enable_gqa")


def _by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    max_q: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What varlen_attn computes, and what it asks of its arguments. [T, heads, D]."""
    assert memory.is_on_device(cu_seq_q)
    assert cu_seq_q.dtype == torch.int32
    for x in (query, key, value):
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert memory.is_on_device(x)
        assert x.dim() == 3
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
    bounds = torch._C.TensorBase.tolist(cu_seq_q)  # no wait: on a GPU, it is the kernel that reads them
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert max(sizes) == max_q
    contexts = []
    for parts in zip(*(x.transpose(0, 1)[None].split(sizes, dim=2) for x in (query, key, value))):
        context = torch.nn.functional.scaled_dot_product_attention(
            *parts, enable_gqa=enable_gqa, scale=scale, is_causal=window_size == (-1, 0)
        )
        contexts.append(context[0].transpose(0, 1))
    return torch.cat(contexts)
