"""The host's threads that an offloaded optimizer steps on."""

from __future__ import annotations

import os

import torch

from megatron_mdm.parallel.cores import give_threads
from tests.ranks import run_ranks


def test_steps_alone_run_on_the_given_threads() -> None:
    threads = []

    class Watched(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            threads.append(torch.get_num_threads())

    before = torch.get_num_threads()
    optimizer = Watched([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    give_threads(optimizer, before + 1)
    for _ in range(2):
        optimizer.step()
        assert torch.get_num_threads() == before
    assert threads == [before + 1, before + 1]


def cores_of_each(first: set[int], second: set[int]) -> int:
    """On one of two ranks, bound to these cores."""
    from megatron_mdm.parallel.cores import own_cores
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    os.sched_setaffinity(0, (first, second)[context.rank])
    return own_cores(context)


def test_cores_are_shared_by_the_ranks_that_may_run_on_them() -> None:
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    assert run_ranks(cores_of_each, 2, cores, cores) == [max(1, len(cores) // 2)] * 2
    if len(cores) > 1:
        assert run_ranks(cores_of_each, 2, one, cores - one) == [1, len(cores) - 1]
