"""The gated unit of the MLP, in fewer passes over memory and with fewer saved tensors than its chain of operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """silu(gate) · up of [gate; up], [..., 2 F] → [..., F]. The activation module of megatron-core's MLP
    (megatron/core/transformer/mlp.py, use_te_activation_func)."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # what fuses the chain, forward and backward
            gate, up = gate_and_up.chunk(2, dim=-1)
            return F.silu(gate) * up
        return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: silu(gate) is computed again, and the gradient is written where it belongs."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=of_up)
        of_up.mul_(gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result
