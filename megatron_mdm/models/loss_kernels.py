"""What computes the losses of a chunk of logits, and their gradient: softmax over a vocabulary that may be
distributed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.parallel import platform


class Shard(NamedTuple):
    """This rank's part of the vocabulary."""

    first_id: int
    num_valid: int  # rows that are not padding
    group: dist.ProcessGroup | None  # None: the whole vocabulary is here

    @classmethod
    def of(cls, num_rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> Shard:
        """num_rows: of the head that a rank of the group holds, padding included."""
        parallel = group is not None and dist.get_world_size(group) > 1
        first_id = dist.get_rank(group) * num_rows if parallel else 0
        return cls(first_id, min(max(vocab_size - first_id, 0), num_rows), group if parallel else None)


class ChunkLosses(NamedTuple):
    cross_entropy: Tensor  # [r] float32
    log_normalizer: Tensor  # [r] float32: log Σ exp logits over the whole vocabulary
    gradient: Any  # [r, V_local] or None: of cross_entropy + z_loss · log_normalizer²


# float32 logits [r, V_local], which are lost; labels [r] int64, global ids; the shard; z_loss; the gradient's type, or
# None for no gradient → losses. Collective over the shard's group.
LossKernel = Callable[[Tensor, Tensor, Shard, float, torch.dtype | None], ChunkLosses]


def torch_losses(
    logits: Tensor, labels: Tensor, shard: Shard, z_loss: float, gradient_type: torch.dtype | None
) -> ChunkLosses:
    """A LossKernel: torch's own kernels, in place. A gradient of 16 bits takes 2 bytes a logit beside the logits' 4."""
    logits[:, shard.num_valid :] = float("-inf")
    local = labels - shard.first_id
    here = (local >= 0) & (local < shard.num_valid)
    local = local.clamp(0, logits.shape[1] - 1)[:, None]
    if shard.group is None:
        label_logit = logits.gather(1, local).squeeze(1)
        # One fused pass, in place: each row is read before it is written. Later, e to its power is the softmax.
        gradient = torch.ops.aten._log_softmax.out(logits, 1, False, out=logits)
        cross_entropy = -gradient.gather(1, local).squeeze(1)
        log_normalizer = cross_entropy + label_logit
        if gradient_type:
            gradient.exp_()
    else:
        maximum = logits.amax(1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=shard.group)
        gradient = logits.sub_(maximum[:, None])
        label_logit = gradient.gather(1, local).squeeze(1).masked_fill(~here, 0.0)
        sums = torch.stack([label_logit, gradient.exp_().sum(1)])
        dist.all_reduce(sums, group=shard.group)
        label_logit, normalizer = sums
        cross_entropy = normalizer.log() - label_logit
        log_normalizer = normalizer.log() + maximum
        gradient.div_(normalizer[:, None])
    if gradient_type is None:
        return ChunkLosses(cross_entropy, log_normalizer, None)
    if z_loss:
        gradient.mul_((1.0 + 2.0 * z_loss * log_normalizer)[:, None])
    gradient.scatter_add_(1, local, -here.to(torch.float32)[:, None])
    return ChunkLosses(cross_entropy, log_normalizer, gradient.to(gradient_type))


def triton_losses(*chunk: Any) -> ChunkLosses:
    """A LossKernel: triton_loss.py's. Triton is imported with the first chunk, as few installations have it."""
    from megatron_mdm.models.triton_loss import losses

    return losses(*chunk)


LOSS_KERNELS: dict[str, LossKernel] = {"torch": torch_losses, "triton": triton_losses}


def resolve_loss_kernel(model: ModelConfig) -> str:
    """The kernel that 'auto' stands for: torch's, as no training step has been timed with Triton's. Raises UserError
    where the one asked for cannot run."""
    if model.loss_kernel == "triton":
        missing = "" if importlib.util.find_spec("triton") else "it is not installed"
        missing = missing or "there is no CUDA device" * (not platform.is_cuda())
        if missing:
            raise UserError(f"'model.loss_kernel' triton: {missing}; use auto or torch")
    return "torch" if model.loss_kernel == "auto" else model.loss_kernel
