"""Every kernel of LOSS_KERNELS against float64, on whole vocabularies and on their shards.

Triton's runs in its interpreter (TRITON_INTERPRET=1), where Triton is installed (1 GB; torch's CPU builds do not bring
it): pip install triton."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.models.cross_entropy import Chunks, weighted_cross_entropy
from megatron_mdm.models.loss_kernels import LOSS_KERNELS, ChunkLosses, Shard, resolve_loss_kernel
from tests.ranks import run_ranks
from tests.small import small_model

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton's kernels are defined
INSTALLED = importlib.util.find_spec("triton") is not None
NEEDED = pytest.mark.skipif(not INSTALLED, reason="needs Triton (1 GB), whose interpreter runs its kernels on the CPU")
KERNELS = [pytest.param(name, marks=[NEEDED] if name == "triton" else []) for name in LOSS_KERNELS]
# Of a rounding, relative. Triton's interpreter cuts bf16's digits off (runtime/interpreter.py, _convert_float).
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # of a rounding, at least


class Case(NamedTuple):
    rows: int
    width: int  # of the logits
    vocab: int  # that are not padding


CASES = {
    "one logit": Case(2, 1, 1),
    "less than a block": Case(7, 56, 50),
    "a block": Case(3, 4096, 4096),
    "one more": Case(3, 4097, 4097),
    "a block of padding": Case(3, 9000, 4000),
    "no rows": Case(0, 56, 50),
}


def draw(case: Case, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(case.rows, case.width, generator=generator)
    return logits, torch.randint(0, case.vocab, (case.rows,), generator=generator)


def exact(logits: Tensor, labels: Tensor, vocab: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, log-normalizer and gradient in float64."""
    valid = logits.double()[:, :vocab]
    log_normalizer = valid.logsumexp(1)
    gradient = torch.zeros_like(logits, dtype=torch.float64)
    gradient[:, :vocab] = (valid - log_normalizer[:, None]).exp() * (1.0 + 2.0 * z_loss * log_normalizer)[:, None]
    gradient[torch.arange(len(labels)), labels] -= 1.0
    return log_normalizer - valid.gather(1, labels[:, None]).squeeze(1), log_normalizer, gradient


def assert_exact(found: Any, expected: tuple[Tensor, ...], logits: Tensor, z_loss: float) -> None:
    """Within float32's rounding: numbers up to the logits' size are rounded some four times each, and an exponential's
    relative error is its argument's error. The gradient's own type adds a rounding."""
    size = float(logits.abs().max()) + 12.0 if logits.numel() else 1.0  # log 126,464 < 12
    rounding = 8 * UNIT[torch.float32] * size
    for name, wanted in zip(("cross_entropy", "log_normalizer"), expected):
        torch.testing.assert_close(getattr(found, name).double(), wanted, rtol=0.0, atol=rounding, msg=name)
    dtype = found.gradient.dtype
    factor = 1.0 + 2.0 * z_loss * size
    relative = rounding + UNIT[dtype]
    difference = (found.gradient.double() - expected[2]).abs()
    # At the label two numbers are subtracted: what is lost is of their size.
    assert (difference <= relative * expected[2].abs() + rounding * factor * (expected[2] != 0) + SMALLEST[dtype]).all()


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_whole_vocabulary(kernel: str, case: Case, dtype: torch.dtype) -> None:
    logits, labels = draw(case)
    for z_loss in (0.0, 0.01):
        found = LOSS_KERNELS[kernel](logits.clone(), labels, Shard(0, case.vocab, None), z_loss, dtype)
        assert found.gradient.dtype == dtype
        assert found.gradient.shape == logits.shape
        assert not found.gradient[:, case.vocab :].any()
        assert_exact(found, exact(logits, labels, case.vocab, z_loss), logits, z_loss)
        without = LOSS_KERNELS[kernel](logits.clone(), labels, Shard(0, case.vocab, None), z_loss, None)
        assert without.gradient is None
        assert torch.equal(without.cross_entropy, found.cross_entropy)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_logits_and_numbers_that_are_none(kernel: str) -> None:
    case = Case(5, 9000, 8999)
    logits, labels = draw(case, spread=1e4)
    found = LOSS_KERNELS[kernel](logits.clone(), labels, Shard(0, case.vocab, None), 0.0, torch.float32)
    assert_exact(found, exact(logits, labels, case.vocab, 0.0), logits, 0.0)
    logits[1, 17] = float("nan")
    logits[2, 4100] = float("inf")
    found = LOSS_KERNELS[kernel](logits.clone(), labels, Shard(0, case.vocab, None), 0.0, torch.float32)
    finite = found.cross_entropy.isfinite()
    assert finite.tolist() == [True, False, False, True, True]
    assert found.gradient[:, : case.vocab].isfinite().all(1).tolist() == finite.tolist()


VOCAB = 4100
PADDED = 3 * 4096  # of two shards, the second of which is half padding


def sharded(kernel: str) -> dict[str, Any]:
    """On a tensor-parallel rank: losses of its part of the logits, with and without a vocabulary beyond its first."""
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(tensor=2))
    results = {}
    for vocab in (VOCAB, PADDED - 5000):
        logits, labels = draw(Case(5, PADDED, vocab))
        mine = logits.chunk(2, 1)[context.tensor_rank].clone()
        shard = Shard.of(mine.shape[1], vocab, context.tensor_group)
        for dtype in (torch.float32, torch.bfloat16):
            found = LOSS_KERNELS[kernel](mine.clone(), labels, shard, 0.01, dtype)
            results[f"{vocab} {dtype}"] = [value.float().numpy() for value in found]
    return results


@pytest.mark.parametrize("kernel", KERNELS)
def test_shards_of_a_vocabulary(kernel: str) -> None:
    """The second of which holds some of it, or nothing but padding."""
    first, second = run_ranks(sharded, 2, kernel)
    for vocab in (VOCAB, PADDED - 5000):
        logits, labels = draw(Case(5, PADDED, vocab))
        expected = exact(logits, labels, vocab, 0.01)
        for dtype in (torch.float32, torch.bfloat16):
            parts = [[torch.from_numpy(value) for value in rank[f"{vocab} {dtype}"]] for rank in (first, second)]
            for ours, others in zip(parts[0][:2], parts[1][:2]):
                assert torch.equal(ours, others)
            gradient = torch.cat([part[2] for part in parts], 1).to(dtype)
            assert_exact(ChunkLosses(parts[0][0], parts[0][1], gradient), expected, logits, 0.01)


@NEEDED
def test_triton_in_the_chunked_head() -> None:
    """Losses and gradients in 16 bits are those by torch's kernels within a rounding of the chunks' gradients."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 300, (20,), generator=generator)
    weights = torch.rand(20, generator=generator)
    tensors = torch.randn(20, 32, generator=generator).bfloat16(), torch.randn(384, 32, generator=generator).bfloat16()
    results = []
    for kernel in LOSS_KERNELS:
        rows, head = (tensor.clone().requires_grad_() for tensor in tensors)
        losses = weighted_cross_entropy(
            rows, head, labels, weights, 300, chunks=Chunks(8 * 384), z_loss=0.01, kernel=kernel
        )
        losses.total.backward()
        results.append([losses.total.detach(), losses.cross_entropy, rows.grad, head.grad])
    for ours, torchs in zip(*results):
        error = (ours.double() - torchs.double()).norm() / torchs.double().norm()
        assert error < UNIT[torch.bfloat16] if ours.dtype == torch.bfloat16 else error < 1e-6


def test_auto_is_what_a_gpu_has_run() -> None:
    assert resolve_loss_kernel(small_model()) == "torch"


def test_triton_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match=r"'model.loss_kernel' triton: .*; use auto or torch"):
        resolve_loss_kernel(small_model(loss_kernel="triton"))
