"""Clipping where DeepSpeed wraps no optimizer: to the limit from above, never from below."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.engine.optimizer import PlainClipping
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.layout import Layout


def clipped(max_norm: float) -> tuple[PlainClipping, torch.nn.Module]:
    """A model whose gradient is (3, 4, 0, 0), of norm 5, after the call."""
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    clipping = PlainClipping(model, max_norm, ParallelContext(0, Layout.of(1, ParallelConfig()), {}, cast(Any, None)))
    clipping()
    return clipping, model


class Made(TorchDispatchMode):
    """The greatest number of elements of a tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(result is value for value in args):
            self.most = max(self.most, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


def test_the_norm_is_exact_and_copies_no_gradient() -> None:
    """A million squares lose 0.1 % in a single float32 sum: a table's are summed row by row."""
    model = torch.nn.Linear(256, 8192, bias=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    expected = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    clipping = PlainClipping(model, 0.0, ParallelContext(0, Layout.of(1, ParallelConfig()), {}, cast(Any, None)))
    with Made() as made:
        clipping()
    assert clipping.norm == pytest.approx(expected, rel=1e-6)
    assert made.most <= 8192


@pytest.mark.parametrize(
    ("max_norm", "expected"), [(1.0, [0.6, 0.8]), (5.1, [3.0, 4.0]), (20.0, [3.0, 4.0]), (0.0, [3.0, 4.0])]
)
def test_a_gradient_is_only_made_shorter(max_norm: float, expected: list[float]) -> None:
    clipping, model = clipped(max_norm)
    assert clipping.norm == 5.0
    assert isinstance(model.weight, torch.Tensor)
    assert model.weight.grad is not None
    assert model.weight.grad[0, :2].tolist() == pytest.approx(expected, rel=1e-5)
