"""Which kernels the layers run on."""

from __future__ import annotations

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.models.spec import resolve_kernels
from tests.ranks import run_ranks
from tests.small import small_model


def cudnn_before_and_after_a_model_is_built() -> tuple[bool, bool]:
    import torch

    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    before = torch.backends.cuda.cudnn_sdp_enabled()
    build_model(small_model(), ParallelConfig(), initialize(), 0)
    return before, torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_is_kept_out_of_attention() -> None:
    """It would plan for every new length."""
    assert run_ranks(cudnn_before_and_after_a_model_is_built, 1) == [(True, False)]


def test_auto_chooses_what_has_been_run() -> None:
    """Also where Transformer Engine is installed and there is a CUDA device: it stays an explicit choice."""
    assert resolve_kernels(small_model(kernels="auto")) == "torch"


def test_transformer_engine_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match=r"'model.kernels' transformer_engine: .*; use auto or torch"):
        resolve_kernels(small_model(kernels="transformer_engine"))
