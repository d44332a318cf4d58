"""torch's variable-length attention in the forms that its versions have: the same contexts from each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mdm.batch import SegmentBounds, Segments
from megatron_mdm.engine.inputs import logits_inputs
from megatron_mdm.models.attention import Visibility, note_on_varlen, segments_by
from megatron_mdm.models.variable_length import VariableLength, installed_kernel

LENGTHS = torch.tensor([3, 7, 5])
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def segments_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None = None, causal: bool = False
) -> Tensor:
    sizes = bounds.diff().tolist()
    parts = zip(*(x.transpose(0, 1)[None].split(sizes, dim=2) for x in (query, key, value)))
    contexts = [
        torch.nn.functional.scaled_dot_product_attention(
            *part, scale=scale, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )
        for part in parts
    ]
    return torch.cat(contexts, dim=2)[0].transpose(0, 1)


def of_2_12(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return segments_one_by_one(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def of_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    assert query.shape == key.shape
    return segments_one_by_one(query, key, value, cu_seq_q, causal=is_causal)


def of_none(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    return of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


KERNELS: dict[str, Callable[..., Any]] = {"2.12": of_2_12, "2.11": of_2_11, "2.10": of_2_10, "bare": of_none}


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*KERNELS, "none"])
def test_contexts_do_not_depend_on_the_version(name: str, causal: bool, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(int(LENGTHS.sum()), 1, heads, WIDTH, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    segments = SegmentBounds.of(LENGTHS)
    assert segments.starts.tolist() == [0, 3, 10, 15]
    assert (segments.starts.dtype, segments.sizes, segments.longest) == (torch.int32, (3, 7, 5), 7)
    tokens = torch.zeros(1, int(LENGTHS.sum()), dtype=torch.int64)
    visible = Visibility(logits_inputs(tokens, Segments(LENGTHS[None], causal=causal), tokens.bool()))
    execute = segments_by(None if name == "none" else VariableLength(KERNELS[name]))
    found = execute(query, key, value, visible, scale)
    expected = segments_one_by_one(*(x[:, 0] for x in (query, key, value)), segments.starts, scale, causal)
    torch.testing.assert_close(found, expected.flatten(1)[:, None], rtol=1e-12, atol=1e-12)


def test_what_a_version_lacks_is_said() -> None:
    assert [VariableLength(kernel).describe() for kernel in KERNELS.values()] == [
        "",
        "heads of keys are repeated",
        "the scale is multiplied into the queries, heads of keys are repeated",
        "the scale is multiplied into the queries, heads of keys are repeated, causal segments run one by one",
    ]


def test_nothing_is_said_of_a_version_that_lacks_nothing() -> None:
    kernel = installed_kernel()
    assert kernel is not None
    assert bool(note_on_varlen()) == bool(VariableLength(kernel).describe())


def test_the_installed_kernel_takes_what_it_is_given() -> None:
    kernel = installed_kernel()
    assert kernel is not None
    named = dict(VariableLength(kernel).causal)
    inspect.signature(kernel).bind(*range(7), **named)
