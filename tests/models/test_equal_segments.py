"""Segments of one length as the rows of a batch: the results of the loop over segments, for few shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mdm.batch import Full, Segments
from megatron_mdm.engine.inputs import InputLayout, logits_inputs
from megatron_mdm.models.attention import SegmentBySegment, Visibility, executor, fused, variable_length
from megatron_mdm.models.equal_segments import EqualSegments

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def visibility(lengths: list[int], causal: bool = False) -> Visibility:
    tokens = torch.zeros(1, sum(lengths), dtype=torch.int64)
    pattern = Segments(torch.tensor([lengths]), causal=causal)
    return Visibility(InputLayout()(logits_inputs(tokens, pattern, tokens.bool())))


def inputs(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """As the layers give them: parts of one tensor."""
    generator = torch.Generator().manual_seed(0)
    fused_qkv = torch.randn(num_tokens, 1, HEADS + 2 * KEY_HEADS, WIDTH, generator=generator)
    parts = fused_qkv.to(dtype).split([HEADS, KEY_HEADS, KEY_HEADS], dim=2)
    return [part.requires_grad_() for part in parts]


def refused(*_: Any) -> Tensor:
    raise AssertionError("the other kernel was called")


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_results_are_those_of_the_loop(dtype: torch.dtype, causal: bool, scale: float | None) -> None:
    """Contexts and gradients, bit for bit: each segment's are computed alike."""
    visible = visibility([6, 6, 6], causal)
    results = []
    for execute in (EqualSegments(fused, refused), SegmentBySegment(fused)):
        tensors = inputs(18, dtype)
        context = execute(*tensors, visible, scale)
        direction = torch.linspace(-1, 1, context.numel()).view(context.shape).to(dtype)
        results.append([context, *torch.autograd.grad(context, tensors, direction)])
    assert results[0][0].shape == (18, 1, HEADS * WIDTH)
    for found, expected in zip(*results):
        assert torch.equal(found, expected)


def test_cudnn_is_allowed_inside_only() -> None:
    seen = []

    def kernel(*arguments: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*arguments)

    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        EqualSegments(kernel, refused)(*inputs(8, torch.bfloat16), visibility([4, 4]), None)
        assert (seen, torch.backends.cuda.cudnn_sdp_enabled()) == ([True], False)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def test_few_shapes_are_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    """What comes after them is for the kernel that no new shape slows down; it is said once."""
    others: list[int] = []

    def other(query: Tensor, *arguments: Any) -> Tensor:
        others.append(len(query))
        return SegmentBySegment(fused)(query, *arguments)

    execute = EqualSegments(fused, other, most_shapes=2)
    for length in (4, 5, 4, 6, 7, 5):
        execute(*inputs(2 * length, torch.bfloat16), visibility([length, length]), None)
    assert others == [12, 14]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attention: segments of one length had more than 2 shapes; cuDNN runs the first 2, further")


def test_what_segments_of_one_length_are() -> None:
    assert visibility([4, 4]).kind == "equal segments"
    assert visibility([4, 4], causal=True).kind == "equal segments"
    assert visibility([4, 5]).kind == "segments"
    assert visibility([4]).kind == "segments"  # where lengths vary, every row is of one
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    assert Visibility(logits_inputs(tokens, Full(), tokens.bool())).kind == "full"


def test_they_run_as_other_segments_where_nothing_is_faster() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert isinstance(executor("equal segments", "cuda", dtype), EqualSegments)
        assert executor("segments", "cuda", dtype) is variable_length
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)):
        assert executor("equal segments", device, dtype) is executor("segments", device, dtype)
