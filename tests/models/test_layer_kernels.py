"""The layers' own forward and backward passes against chains of torch's operations."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mdm.models.activation import SwiGLU
from megatron_mdm.models.attention import explicit_attention
from megatron_mdm.models.norms import RMSNorm
from megatron_mdm.models.rotary import Rotation, rotate, turned_by_halves

TYPES = {
    "fp64": (torch.float64, 1e-14),
    "fp32": (torch.float32, 2e-6),
    "bf16": (torch.bfloat16, 2e-2),
}  # some roundings
CONFIG = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.empty(*shape).normal_(generator=torch.Generator().manual_seed(seed))


def assert_same(ours, reference, *inputs: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """Values and gradients of ours in a type, and of the reference on the same numbers in fp64, relative to the
    greatest of each."""
    mine = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in mine]
    value = ours(*mine)
    expected = reference(*exact)
    direction = normal(*value.shape, seed=1).double()
    found = [value, *torch.autograd.grad(value, mine, direction.to(value.dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, direction)]
    for one, other in zip(found, wanted):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("name", TYPES)
def test_gated_unit(name: str) -> None:
    def chain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    dtype, tolerance = TYPES[name]
    assert_same(SwiGLU(), chain, 3.0 * normal(5, 3, 24), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("name", TYPES)
def test_norm(name: str) -> None:
    dtype, tolerance = TYPES[name]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        norm = RMSNorm(CONFIG, 8, eps=0.1).to(dtype)
        del norm.weight
        norm.weight = weight
        return norm(x)

    def chain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), weight, 0.1)

    inputs = normal(5, 3, 8), 1.0 + normal(8, seed=2)
    assert_same(ours, chain, *inputs, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_rotation(name: str, heads_first: bool) -> None:
    dtype, tolerance = TYPES[name]
    angles = normal(7, 1, 1, 3).repeat(1, 1, 1, 2)

    def ours(x: Tensor) -> Tensor:
        return rotate(x, Rotation.of(angles, dtype), heads_first)

    def chain(x: Tensor) -> Tensor:
        return _apply_rotary_pos_emb_bshd(x, angles)

    assert_same(ours, chain, normal(7, 2, 3, 6), dtype=dtype, tolerance=tolerance)
    assert ours(normal(7, 2, 3, 6).to(dtype)).permute(1, 2, 0, 3).is_contiguous() == heads_first


@pytest.mark.parametrize("name", TYPES)
def test_rotation_by_halves_is_the_same(name: str) -> None:
    """What CUDA runs."""
    dtype, tolerance = TYPES[name]
    rotation = Rotation.of(normal(7, 1, 1, 3).repeat(1, 1, 1, 2), dtype)
    x = normal(7, 2, 3, 6).to(dtype)
    found = turned_by_halves(x, *rotation, torch.empty_like(x))
    torch.testing.assert_close(found, rotate(x, rotation, False), rtol=tolerance, atol=tolerance)


def test_what_is_turned_keeps_no_other_memory() -> None:
    """Attention keeps queries and keys for its backward pass: not also what they were made with."""
    x = normal(7, 2, 3, 6)
    for heads_first in (False, True):
        found = rotate(x, Rotation.of(normal(7, 1, 1, 3).repeat(1, 1, 1, 2), x.dtype), heads_first)
        assert found.untyped_storage().nbytes() == x.untyped_storage().nbytes()


@pytest.mark.parametrize("masking", ["none", "padding", "causal"])
@pytest.mark.parametrize("name", TYPES)
def test_explicit_attention(name: str, masking: str) -> None:
    dtype, tolerance = TYPES[name]
    mask = None
    if masking == "padding":
        mask = (torch.arange(6)[None, :] < torch.tensor([6, 4])[:, None])[:, None, None, :]
    causal = masking == "causal"

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return explicit_attention(query, key, value, mask, None, causal)

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)

    inputs = normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=3), normal(2, 2, 6, 8, seed=4)
    assert_same(ours, fused, *inputs, dtype=dtype, tolerance=tolerance)
