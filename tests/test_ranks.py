"""The pool of ranks itself."""

from __future__ import annotations

import sys

import pytest

from tests.ranks import run_ranks


def what_a_rank_finds() -> tuple[bool, bool, int, int]:
    import torch.distributed as dist

    imported = "deepspeed" in sys.modules and "megatron_mdm.training.run" in sys.modules
    from megatron_mdm.parallel.groups import initialize

    fresh = not dist.is_initialized()
    context = initialize()
    return imported, fresh, context.rank, context.layout.data


def fails() -> None:
    raise ValueError("on purpose")


def test_ranks_are_real_fresh_and_have_imported_the_libraries() -> None:
    assert run_ranks(what_a_rank_finds, 3) == [(True, True, rank, 3) for rank in range(3)]


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="on purpose"):
        run_ranks(fails, 2)
