"""The chunked, fused cross-entropy against torch's own, in value and gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.models.cross_entropy import CHUNKS, Chunks, weighted_cross_entropy
from tests.models.test_loss_kernels import KERNELS
from tests.ranks import run_ranks

ROWS = 37
HIDDEN = 16
VOCAB = 50
PADDED = 56


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    head = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return rows, head, labels, torch.rand(ROWS, generator=generator)


# Signs of the weights, as reinforcement learning has them; the largest positive one may be small, or there may be none.
SIGNED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative": lambda weights: -weights,
    "mixed": lambda weights: torch.where(torch.arange(ROWS) % 3 == 0, weights, -weights),
    "hardly positive": lambda weights: torch.where(torch.arange(ROWS) == 5, 1e-20, -weights),
    "small": lambda weights: -1e-9 * weights,  # whose gradients fp16 cannot hold
}


def reference(
    dtype: torch.dtype = torch.float32, weights_of: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> tuple[torch.Tensor, ...]:
    rows, head, labels, weights = inputs(dtype)
    weights = weights_of(weights)
    rows.requires_grad_(), head.requires_grad_()
    cross_entropy = F.cross_entropy((rows @ head[:VOCAB].t()).float(), labels, reduction="none")
    (3.0 * (weights * cross_entropy).sum()).backward()
    return cross_entropy.detach(), rows.grad, head.grad


@pytest.mark.parametrize("chunks", [Chunks(1), Chunks(5 * PADDED), Chunks(1, least_rows=16, multiple=8), Chunks(10**9)])
def test_equals_torch(chunks: Chunks) -> None:
    rows, head, labels, weights = inputs()
    rows.requires_grad_(), head.requires_grad_()
    total, cross_entropy, _ = weighted_cross_entropy(rows, head, labels, weights, VOCAB, chunks=chunks)
    (3.0 * total).backward()
    expected, grad_rows, grad_head = reference()
    torch.testing.assert_close(cross_entropy, expected)
    torch.testing.assert_close(total, (weights * expected).sum())
    torch.testing.assert_close(rows.grad, grad_rows)
    torch.testing.assert_close(head.grad, grad_head)


@pytest.mark.parametrize(("vocab", "rows"), [(126_464, 2048), (8192, 32_768), (512, 50_048)])
def test_chunks_on_cuda_fill_the_device(vocab: int, rows: int) -> None:
    """At least 2,048 rows, in multiples of 128, at most 256 Mi logits where that allows it; shares are equal."""
    chunks = CHUNKS["cuda"]
    assert chunks.rows(50_000, vocab) <= rows
    assert chunks.rows(2 * rows, vocab) == rows or vocab == 512
    for num_rows in (1, 2049, 50_000):
        size = chunks.rows(num_rows, vocab)
        assert size % 128 == 0
        last = num_rows - (-(-num_rows // size) - 1) * size
        assert 0 < last <= size
    assert chunks.rows(2049, 126_464) == 1152  # not 2,048 and then 1


def test_gradient_of_the_head_is_summed_in_float32() -> None:
    """Against the float64 gradient from the same 16-bit inputs, in many chunks: 1.6 % when it was summed in bf16."""
    generator = torch.Generator().manual_seed(0)
    vocab = 2048
    rows = torch.randn(1000, 256, generator=generator).bfloat16()
    head = (torch.randn(vocab, 256, generator=generator) * 0.05).bfloat16()
    labels = torch.randint(0, vocab, (1000,), generator=generator)
    weights = torch.rand(1000, generator=generator)
    exact = head.double().requires_grad_()
    (weights * F.cross_entropy(rows.double() @ exact.t(), labels, reduction="none")).sum().backward()
    for rows_of_a_chunk in (8, 1000):
        tensor = head.clone().requires_grad_()
        chunks = Chunks(vocab * rows_of_a_chunk)
        weighted_cross_entropy(rows, tensor, labels, weights, vocab, chunks=chunks).total.backward()
        assert tensor.grad is not None
        assert exact.grad is not None
        error = torch.linalg.vector_norm(tensor.grad.double() - exact.grad) / torch.linalg.vector_norm(exact.grad)
        assert error < 3e-3, rows_of_a_chunk


def test_gradients_of_rows_are_measured_with_and_without_autograd() -> None:
    rows, head, labels, weights = inputs()
    expected = reference()[1].square().sum(1) / 9.0  # of 3 × the total
    with torch.no_grad():
        losses = weighted_cross_entropy(rows, head, labels, weights, VOCAB, row_gradients=True)
        assert not weighted_cross_entropy(rows, head, labels, weights, VOCAB).gradient_square.any()
    torch.testing.assert_close(losses.gradient_square, expected)
    rows.requires_grad_()
    torch.testing.assert_close(
        weighted_cross_entropy(rows, head, labels, weights, VOCAB).gradient_square.detach(), expected
    )


def test_bf16_is_close_to_fp32() -> None:
    rows, head, labels, weights = inputs(torch.bfloat16)
    rows.requires_grad_(), head.requires_grad_()
    total, cross_entropy, _ = weighted_cross_entropy(rows, head, labels, weights, VOCAB)
    (3.0 * total).backward()
    expected, grad_rows, grad_head = reference(torch.bfloat16)
    torch.testing.assert_close(cross_entropy, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows.grad, grad_rows, rtol=0.05, atol=0.05)
    torch.testing.assert_close(head.grad, grad_head, rtol=0.05, atol=0.05)


def test_z_loss() -> None:
    rows, head, labels, weights = inputs()
    rows.requires_grad_(), head.requires_grad_()
    logits = rows @ head[:VOCAB].t()
    expected = weights * (F.cross_entropy(logits, labels, reduction="none") + 0.1 * logits.logsumexp(1).square())
    expected.sum().backward()
    grad_rows = rows.grad
    grad_head = head.grad
    rows.grad = head.grad = None
    total, *_ = weighted_cross_entropy(rows, head, labels, weights, VOCAB, z_loss=0.1)
    total.backward()
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(rows.grad, grad_rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.grad, grad_head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", SIGNED)
def test_signed_weights(sign: str, kernel: str, dtype: torch.dtype) -> None:
    """Values and gradients against float64 from the same inputs, whatever the signs; in chunks, with a frozen head, and
    where gradients are only measured. A loss scale brings the smallest gradients into fp16's range, as in training."""
    rows, head, labels, weights = inputs(dtype)
    weights = SIGNED[sign](weights)
    exact_rows, exact_head = (tensor.double().requires_grad_() for tensor in (rows, head))
    exact = F.cross_entropy(exact_rows @ exact_head[:VOCAB].t(), labels, reduction="none")
    (weights * exact).sum().backward()
    assert exact_rows.grad is not None
    assert exact_head.grad is not None
    loss_scale = 1.0 / float(weights.abs().max())
    # A chunk's gradient, its product, the weighted one and the result are rounded, the head's rows once more.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5 * 2.0**-8, torch.float16: 5 * 2.0**-11}[dtype]

    def close(ours: torch.Tensor, theirs: torch.Tensor, scale: float = 1.0) -> None:
        error = torch.linalg.vector_norm(ours.double() / scale - theirs) / torch.linalg.vector_norm(theirs)
        assert error < tolerance

    for trained in ({"rows", "head"}, {"rows"}, {"head"}):
        ours_rows = rows.clone().requires_grad_("rows" in trained)
        ours_head = head.clone().requires_grad_("head" in trained)
        losses = weighted_cross_entropy(
            ours_rows, ours_head, labels, weights, VOCAB, chunks=Chunks(10 * PADDED), row_gradients=True, kernel=kernel
        )
        (loss_scale * losses.total).backward()
        close(losses.cross_entropy, exact.detach())
        close(losses.total.detach(), (weights * exact).sum().detach())
        close(losses.gradient_square.sqrt(), exact_rows.grad.norm(dim=1))
        if "rows" in trained:
            close(ours_rows.grad, exact_rows.grad, loss_scale)
        if "head" in trained:
            close(ours_head.grad, exact_head.grad, loss_scale)
    assert all(torch.isfinite(value).all() for value in losses)


def test_no_rows_and_no_gradient() -> None:
    rows, head, labels, weights = inputs()
    head.requires_grad_()
    total, cross_entropy, _ = weighted_cross_entropy(rows[:0], head, labels[:0], weights[:0], VOCAB)
    total.backward()
    assert total == 0.0
    assert len(cross_entropy) == 0
    assert (head.grad == 0).all()
    with torch.no_grad():
        assert not weighted_cross_entropy(rows, head, labels, weights, VOCAB).total.requires_grad


class Operations(TorchDispatchMode):
    """Counts matrix products, and the shapes of tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0
        self.shapes = Counter[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        given, made = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        memories = {x.untyped_storage().data_ptr() for x in given}
        self.shapes.update(tuple(x.shape) for x in made if x.untyped_storage().data_ptr() not in memories)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["rows", "head"])
def test_only_the_gradients_that_are_asked_for_are_computed(trained: str, dtype: torch.dtype) -> None:
    """A frozen head's, as under LoRA, costs neither its product nor its float32 sum; likewise that of frozen rows. What
    is computed is bit for bit what it is when both train."""
    chunks = Chunks(10 * PADDED)  # 4 of them

    def run(requires_grad: set[str]) -> tuple[Operations, list[torch.Tensor | None]]:
        rows, head, labels, weights = inputs(dtype)
        rows.requires_grad_("rows" in requires_grad)
        head.requires_grad_("head" in requires_grad)
        with Operations() as operations:
            losses = weighted_cross_entropy(rows, head, labels, weights, VOCAB, chunks=chunks)
            (3.0 * losses.total).backward()
        return operations, [losses.total.detach(), losses.cross_entropy, rows.grad, head.grad, losses.gradient_square]

    both, (*losses, of_rows, of_head, square) = run({"rows", "head"})
    one, (*found, found_of_rows, found_of_head, found_square) = run({trained})
    assert torch.equal(torch.stack(losses[:1]), torch.stack(found[:1]))
    assert torch.equal(losses[1], found[1])
    assert (both.num_products, one.num_products) == (4 * 3, 4 * 2)
    assert {(ROWS, HIDDEN), (PADDED, HIDDEN)} <= both.shapes.keys()
    if trained == "rows":
        assert found_of_head is None
        assert torch.equal(found_of_rows, of_rows)
        assert torch.equal(found_square, square)
        assert (PADDED, HIDDEN) not in one.shapes
    else:
        assert found_of_rows is None
        assert torch.equal(found_of_head, of_head)
        assert not found_square.any()
        assert (ROWS, HIDDEN) not in one.shapes


def test_all_chunks_logits_have_one_memory() -> None:
    """On a CPU in fp32: new memory's pages are cleared by the system, one by one."""
    rows, head, labels, weights = inputs()
    rows.requires_grad_(), head.requires_grad_()
    with Operations() as operations:
        weighted_cross_entropy(rows, head, labels, weights, VOCAB, chunks=Chunks(10 * PADDED)).total.backward()
    made = {shape: number for shape, number in operations.shapes.items() if shape[-1:] == (PADDED,)}
    assert made == {(10, PADDED): 1}


def test_gradients_of_rows_are_measured_while_only_the_head_trains() -> None:
    rows, head, labels, weights = inputs()
    losses = weighted_cross_entropy(rows, head.requires_grad_(), labels, weights, VOCAB, row_gradients=True)
    losses.total.backward()
    torch.testing.assert_close(losses.gradient_square, reference()[1].square().sum(1) / 9.0)
    torch.testing.assert_close(3.0 * head.grad, reference()[2])


def sharded() -> dict[str, list[Any]]:
    """On a tensor-parallel rank: its slice of the head, by the weights' signs."""
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(tensor=2))
    results = {}
    for sign, of in {"positive": torch.clone, **SIGNED}.items():
        rows, head, labels, weights = inputs()
        mine = head.chunk(2)[context.tensor_rank].clone().requires_grad_()
        rows.requires_grad_()
        total, cross_entropy, _ = weighted_cross_entropy(
            rows, mine, labels, of(weights), VOCAB, context.tensor_group, Chunks(5 * PADDED)
        )
        (3.0 * total).backward()
        assert rows.grad is not None
        assert mine.grad is not None
        results[sign] = [value.numpy() for value in (cross_entropy, rows.grad, mine.grad)]
    return results


def test_vocabulary_parallel_equals_torch() -> None:
    results = run_ranks(sharded, 2)
    for sign, of in {"positive": torch.clone, **SIGNED}.items():
        expected, grad_rows, grad_head = reference(weights_of=of)
        scale = float(grad_rows.abs().max())
        for rank, result in enumerate(results):
            cross_entropy, rows, head = (torch.from_numpy(value) for value in result[sign])
            torch.testing.assert_close(cross_entropy, expected)
            torch.testing.assert_close(rows / scale, grad_rows / scale)
            torch.testing.assert_close(head / scale, grad_head.chunk(2)[rank] / scale)
