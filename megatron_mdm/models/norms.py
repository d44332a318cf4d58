"""RMSNorm for megatron-core's layer specs, where its own needs Apex or Transformer Engine."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm behind the signature that megatron-core builds norms with. On CPUs, where torch has no kernel but
    a chain of a dozen operations, its own forward and backward pass."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H]; the sums are in float32 or, where x is, in float64."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = w · x · r, r = (mean(x²) + eps)^(−1/2). Keeps x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        root = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        normed = wide * root
        return normed.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        width = x.shape[-1]
        rows = x.to(root.dtype).reshape(-1, width)
        gradient = gradient.to(root.dtype).reshape(-1, width)
        root = root.reshape(-1, 1)
        product = gradient * rows  # ∂loss/∂w = Σ_rows g x r, and the norm's own gradient from Σ_columns g w x
        of_weight = product.t().mv(root.squeeze(1)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = product.mv(weight.to(root.dtype)).unsqueeze(1)
        of_input = torch.mul(gradient, weight, out=product).mul_(root)
        of_input.addcmul_(rows, along.mul_(root.pow(3)).div_(width), value=-1.0)
        return of_input.view_as(x).to(x.dtype), of_weight, None
