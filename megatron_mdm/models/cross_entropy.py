"""Weighted cross-entropy of selected rows against a vocabulary-parallel head, chunk by chunk.

Logits exist for one chunk of rows at a time. As the rows' weights are known before the forward pass, each chunk's
gradient is taken while its logits are there, so nothing of size rows × vocabulary is kept for the backward pass and
nothing is computed twice.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.models.loss_kernels import LOSS_KERNELS, Shard


class Chunks(NamedTuple):
    """How many rows' logits are held at a time: fewer make slow matrix products, more cost memory."""

    elements: int  # logits, at most
    least_rows: int = 1  # whatever the vocabulary
    multiple: int = 1  # of rows, as a device's kernels want them

    def rows(self, num_rows: int, width: int) -> int:
        """Rows of each chunk but the last, for logits [num_rows, width]: as equal as the multiple allows."""
        most = max(self.elements // width, self.least_rows)
        most = max(most - most % self.multiple, 1)
        number = max(-(-num_rows // most), 1)
        return max(_round_up(-(-num_rows // number), self.multiple), 1)


# On CUDA a product of fewer than some 2,048 rows does not fill the device: on an H200, 8,192 rows × 2,048 and a
# vocabulary of 126,464 take 102 ms in chunks of 128 rows, 29 ms of 2,048, 28 ms at once. A chunk is 0.97 GiB of float32
# logits, and 0.48 GiB of their gradient in 16 bits.
CHUNKS = {
    "cpu": Chunks(16 * 1024 * 1024),
    "cuda": Chunks(256 * 1024 * 1024, least_rows=2048, multiple=128),
}

_PRODUCT_ROWS = 16 * 1024  # of the head's gradient that are multiplied at a time, before they are summed in float32


class RowLosses(NamedTuple):
    total: Tensor  # scalar float32: Σ_r weight_r · CE_r; carries the gradient
    cross_entropy: Tensor  # [R] float32, detached
    gradient_square: Tensor  # [R] float32, detached: ‖∂(weight_r · CE_r)/∂row_r‖²; zeros where it was not computed


def weighted_cross_entropy(
    rows: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunks: Chunks | None = None,
    z_loss: float = 0.0,
    row_gradients: bool = False,
    kernel: str = "torch",
) -> RowLosses:
    """Cross-entropy of `rows @ head.T` with the vocabulary split over a tensor-parallel group.

    rows [R, H], the same on every rank of the group; head [V_local, H], this rank's slice, all of one size; rows of
    the whole head from vocab_size on are padding and take no probability; labels [R] int64, global ids; weights [R]
    float32, of either sign. The softmax is in float32 whatever the inputs, and so is the sum over chunks of the head's
    gradient, which is rounded to the head's type once, in the backward pass. The gradient of rows is already summed
    over the group.
    Only gradients that are required are computed: a frozen head's costs no product and no memory.
    chunks: None for the device's own.
    row_gradients: compute gradient_square where rows require no gradient, too.
    kernel: of LOSS_KERNELS (loss_kernels.py), for the softmax and its gradient.
    z_loss adds z_loss · (log Σ exp logits)² to each row's share of the total (PaLM, Section 5), not to cross_entropy.
    """
    train_rows, train_head = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, head))
    shard = Shard.of(len(head), vocab_size, group)
    chunks = chunks or CHUNKS[head.device.type]
    return RowLosses(
        *_WeightedCrossEntropy.apply(
            rows, head, labels, weights, shard, chunks, z_loss, kernel, train_rows or row_gradients, train_head
        )
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        shard: Any,
        chunks: Any,
        z_loss: float,
        kernel: str,
        row_gradients: bool,
        head_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        cross_entropy, log_normalizer = torch.empty(2, len(rows), dtype=torch.float32, device=rows.device)
        grad_rows: Any = torch.empty_like(rows) if row_gradients else None
        new_total = torch.empty_like if len(rows) else torch.zeros_like
        grad_head: Any = new_total(head, dtype=torch.float32) if head_gradient else None
        # Gradients are kept for the greatest |weight| 1, so that they do not vanish in fp16, and scaled in backward.
        scale = weights.abs().max().clamp_min(1e-30) if len(rows) else weights.new_ones(())
        relative = (weights / scale)[:, None]
        gradient_type = head.dtype if row_gradients or head_gradient else None
        chunk = chunks.rows(len(rows), len(head))
        memory = _common_memory(min(chunk, len(rows)), head)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits = _logits(rows[part], head, memory)
            cross_entropy[part], log_normalizer[part], gradient = LOSS_KERNELS[kernel](
                logits, labels[part], shard, z_loss, gradient_type
            )
            if row_gradients:  # weights multiply [r, H] here rather than [r, V] above
                torch.mm(gradient, head, out=grad_rows[part])
                grad_rows[part] *= relative[part]
            if head_gradient:
                weighted = (rows[part] * relative[part]).to(head.dtype)  # float32 until here: rounded once
                _add_product(grad_head, gradient.t(), weighted, is_first=start == 0)
            del logits, gradient  # or they would stay until the next chunk's are there
        gradient_square = torch.zeros_like(cross_entropy)
        if row_gradients:
            if shard.group is not None:
                dist.all_reduce(grad_rows, group=shard.group)
            gradient_square = torch.linalg.vector_norm(grad_rows, dim=1, dtype=torch.float32).mul_(scale).square_()
        ctx.grad_rows = grad_rows if ctx.needs_input_grad[0] else None  # else only its squares were asked for
        ctx.grad_head = grad_head
        ctx.dtype = head.dtype
        ctx.scale = scale
        ctx.mark_non_differentiable(cross_entropy, gradient_square)
        total = (weights * (cross_entropy + z_loss * log_normalizer.square())).sum()
        return total, cross_entropy, gradient_square

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_rows = ctx.grad_rows
        grad_head = ctx.grad_head
        ctx.grad_rows = None
        ctx.grad_head = None
        factor = grad_total * ctx.scale
        of_rows, of_head = ctx.needs_input_grad[:2]
        return (
            grad_rows.mul_(factor) if of_rows else None,
            grad_head.mul_(factor).to(ctx.dtype) if of_head else None,
            *[None] * 8,
        )


def _common_memory(rows: int, head: Tensor) -> Tensor | None:
    """For the logits of one chunk after another, as the system clears the pages of new memory for each. None where they
    take new memory: CUDA's allocator keeps what was freed, and a CPU's 16-bit logits have another type first."""
    if head.device.type != "cpu" or head.dtype != torch.float32:
        return None
    return head.new_empty(rows, len(head))


def _logits(rows: Tensor, head: Tensor, memory: Tensor | None) -> Tensor:
    """[r, V] float32, in the memory where there is one."""
    if memory is None:
        return _wide_product(rows, head.t()).float()
    return torch.mm(rows, head.t(), out=memory[: len(rows)])


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] · right [k, n], of the same 16-bit type or float32: on CUDA in float32, not rounded in between; the
    CPU has no such product of 16-bit numbers, and its result is of their type."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total [m, n] float32 += left [m, k] · right [k, n], of the same 16-bit type or float32. is_first: = instead."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=0.0 if is_first else 1.0)
        return
    for sums, part in zip(total.split(_PRODUCT_ROWS), left.split(_PRODUCT_ROWS)):
        product = _wide_product(part, right)
        if is_first:
            sums.copy_(product)
        else:
            sums.add_(product)


def _round_up(number: int, multiple: int) -> int:
    return number + -number % multiple
