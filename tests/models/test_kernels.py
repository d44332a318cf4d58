"""Which kernels the layers run on."""

from __future__ import annotations

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.models.spec import resolve_kernels
from tests.small import small_model


def test_auto_chooses_what_has_been_run() -> None:
    """Also where Transformer Engine is installed and there is a CUDA device: it stays an explicit choice."""
    assert resolve_kernels(small_model(kernels="auto")) == "torch"


def test_transformer_engine_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match=r"'model.kernels' transformer_engine: .*; use auto or torch"):
        resolve_kernels(small_model(kernels="transformer_engine"))
