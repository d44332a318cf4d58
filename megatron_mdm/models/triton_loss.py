"""Losses of a chunk of logits in two passes over them: one reads, for each row's normalizer; one reads and writes the
gradient, in its own type.

Between the passes, ranks that share the vocabulary compare and sum three numbers a row. A gradient of 16 bits takes 2
bytes a logit beside the logits' 4, one in float32 their place: the peak is torch_losses' (engine/memory.py, _head).
What moves between memory and device is 10 bytes a logit, 12 in float32; torch's kernels move 22 or more.

It needs CUDA; Triton's interpreter runs it on the CPU (TRITON_INTERPRET=1), which is how the tests run it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_mdm.models.loss_kernels import ChunkLosses, Shard

BLOCK = 4096  # logits that a program reads at a time
NUM_WARPS = 8


def losses(
    logits: Tensor, labels: Tensor, shard: Shard, z_loss: float, gradient_type: torch.dtype | None
) -> ChunkLosses:
    """A LossKernel (loss_kernels.py). Raises nothing of its own: not a number in a row makes its losses so."""
    maximum, normalizer, label_logit = _normalizers(logits, labels, shard)
    log_sum = normalizer.log()
    log_normalizer = log_sum + maximum
    cross_entropy = log_sum - label_logit
    if gradient_type is None:
        return ChunkLosses(cross_entropy, log_normalizer, None)
    factor = (1.0 + 2.0 * z_loss * log_normalizer) / normalizer
    return ChunkLosses(cross_entropy, log_normalizer, _gradient(logits, labels, shard, maximum, factor, gradient_type))


def _normalizers(logits: Tensor, labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """[r] float32 each: the greatest logit, Σ exp(logit − greatest) and the label's logit less the greatest, over the
    whole vocabulary."""
    maximum, normalizer, label_logit = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _normalize[(len(logits),)](
            logits,
            labels,
            maximum,
            normalizer,
            label_logit,
            logits.stride(0),
            shard.first_id,
            shard.num_valid,
            logits.shape[1],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    if shard.group is None:
        return maximum, normalizer, label_logit - maximum
    own_maximum = maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=shard.group)
    local = labels - shard.first_id
    here = (local >= 0) & (local < shard.num_valid)
    sums = torch.stack([normalizer * (own_maximum - maximum).exp(), (label_logit - maximum).masked_fill(~here, 0.0)])
    dist.all_reduce(sums, group=shard.group)
    return maximum, sums[0], sums[1]


def _gradient(
    logits: Tensor, labels: Tensor, shard: Shard, maximum: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor:
    """exp(logit − maximum) · factor, less 1 at the label; 0 at padding. [r, V_local] of dtype, in the logits' place
    where that is float32. maximum, factor [r] float32."""
    rows, width = logits.shape
    gradient = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    if rows:
        _differentiate[(rows, triton.cdiv(width, BLOCK))](
            logits,
            gradient,
            labels,
            maximum,
            factor,
            logits.stride(0),
            gradient.stride(0),
            shard.first_id,
            shard.num_valid,
            width,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return gradient


@triton.jit
def _normalize(  # type: ignore[no-untyped-def]
    logits, labels, maximum, normalizer, label_logit, stride, first_id, num_valid, width, BLOCK: tl.constexpr
):
    """A program a row: its greatest logit of those that are not padding, the sum of exp(logit − greatest), and its
    label's logit, where that is here."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    # Each lane has a maximum and a sum of its own, so that nothing is exchanged until the end. They begin at the lowest
    # number, not at −∞, which has no difference to itself.
    greatest = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_valid, BLOCK):
        columns = start + lanes
        values = _valid(logits, columns, num_valid, width)
        before = greatest
        greatest = tl.maximum(before, values)
        total = total * tl.exp(before - greatest) + tl.exp(values - greatest)
    row_greatest = tl.max(greatest, 0)
    tl.store(maximum + row, row_greatest)
    tl.store(normalizer + row, tl.sum(total * tl.exp(greatest - row_greatest), 0))
    local = tl.load(labels + row) - first_id
    here = (local >= 0) & (local < num_valid)
    tl.store(label_logit + row, tl.load(logits + local, mask=here, other=0.0))


@triton.jit
def _differentiate(  # type: ignore[no-untyped-def]
    logits,
    gradient,
    labels,
    maximum,
    factor,
    stride,
    gradient_stride,
    first_id,
    num_valid,
    width,
    BLOCK: tl.constexpr,
):
    """A program a block of a row: see _gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = _valid(logits + row * stride, columns, num_valid, width)
    label = tl.load(labels + row) - first_id
    result = tl.exp(values - tl.load(maximum + row)) * tl.load(factor + row)
    result = tl.where((columns == label) & (columns < num_valid), result - 1.0, result)
    tl.store(gradient + row * gradient_stride + columns, result.to(gradient.dtype.element_ty), mask=columns < width)


@triton.jit
def _valid(logits, columns, num_valid, width):  # type: ignore[no-untyped-def]
    """Logits of a row, −∞ at padding. Padding is read, too: the width is a multiple of what one instruction reads, the
    vocabulary need not be."""
    values = tl.load(logits + columns, mask=columns < width, other=float("-inf"))
    return tl.where(columns < num_valid, values, float("-inf"))
