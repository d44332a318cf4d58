"""The optimizer, and what DeepSpeed leaves undone around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.models.naming import rows_of
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.cores import give_threads, own_cores
from megatron_mdm.parallel.groups import ParallelContext


def adamw(model: torch.nn.Module, config: RunConfig, context: ParallelContext) -> torch.optim.AdamW:
    """AdamW of what is trained here, with decay where the table of parameters says so. The fused kernel exists on CPU
    and CUDA. Collective over the job."""
    settings = config.optimizer
    trained = [(row.decay, tensor) for row, tensor in rows_of(model, config.model) if row.trained]
    groups: list[dict[str, Any]] = [
        {"params": [tensor for decay, tensor in trained if decay], "weight_decay": settings.weight_decay},
        {"params": [tensor for decay, tensor in trained if not decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # a pipeline stage may have no norms
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    if config.parallel.offload != "none" and platform.is_cuda():  # launchers give each rank of a GPU one thread
        give_threads(optimizer, own_cores(context))
    return optimizer


def scaled_unless_faulty(total: Tensor, factor: float) -> Tensor:
    """A micro-batch's loss times a factor; where it is infinite or not a number, so are all its gradients.

    The reduced gradient's norm, by which every rank skips the step, then tells of a faulty loss anywhere.
    """
    return total * torch.where(total.detach().isfinite(), factor, float("nan"))


def norm_of_step(engine: Any, clipping: PlainClipping | None) -> float:
    """The gradient's norm in the step just taken; infinite where DeepSpeed skipped it, which it does by that norm."""
    if clipping:
        return clipping.norm
    return float("inf") if engine.optimizer.overflow else float(engine.get_global_grad_norm())


class PlainClipping:
    """Gradient norm and clipping where DeepSpeed wraps no optimizer (ZeRO 0 in fp32).

    DeepSpeed's own counts replicated parameters on the first pipeline stage only and keeps no norm.
    """

    def __init__(self, model: torch.nn.Module, max_norm: float, context: ParallelContext) -> None:
        self.model = model
        self.max_norm = max_norm
        self.context = context
        self.norm = float("nan")

    def __call__(self) -> None:
        """Measure and clip, between the gradients' reduction and the optimizer's step. Collective over the
        model-parallel ranks."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        counted = [p.grad for p in self._counted() if p.grad is not None]
        squares = torch.stack([_square_sum(gradient) for gradient in counted] or [torch.zeros(())]).sum()
        squares = squares.to(gradients[0].device)
        if self.context.layout.tensor > 1:
            dist.all_reduce(squares, group=self.context.tensor_group)
        if self.context.layout.pipeline > 1:
            dist.all_reduce(squares, group=self.context.pipeline_group)
        self.norm = float(squares.sqrt())
        if not math.isfinite(self.norm):
            for parameter in self.model.parameters():
                parameter.grad = None  # the optimizer then leaves weight and moments as they are
        if 0.0 < self.max_norm < self.norm:
            for gradient in gradients:
                gradient.mul_(self.max_norm / (self.norm + 1e-6))

    def _counted(self) -> Iterator[torch.nn.Parameter]:
        """This rank's part: what every tensor-parallel rank holds counts on the first, tied weights on one stage."""
        first = self.context.tensor_rank == 0
        for parameter in self.model.parameters():
            replicated = getattr(parameter, "ds_pipe_replicated", False)
            if parameter.grad is not None and not replicated and (first or is_model_parallel_parameter(parameter)):
                yield parameter


def _square_sum(gradient: Tensor) -> Tensor:
    """Scalar float32, without a copy of the gradient: row by row, as one sum in float32 over all would lose digits."""
    rows = gradient.flatten(1) if gradient.dim() > 1 else gradient[None]
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square_().sum()
