"""What is set for a rank on the CPU."""

from __future__ import annotations

import resource

from tests.ranks import run_ranks


def faults_of_large_tensors() -> int:
    """On a rank: pages that are faulted in for a tensor of 64 MiB (16,384 pages) that another has just left."""
    import torch

    from megatron_mdm.parallel.groups import initialize

    initialize()
    for _ in range(2):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again() -> None:
    assert run_ranks(faults_of_large_tensors, 1)[0] < 100
