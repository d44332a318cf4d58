"""The cores that ranks run on: each one's share of them, and whether it has one for itself.

A rank that waits for a core is not slow, and its times say little.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_mdm.parallel import platform
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext

_SHARE = 0.1  # of a rank's time that it may wait for a core, for its times to be compared
_SCHEDULE = "/proc/thread-self/schedstat"  # nanoseconds: on a core, ready to run but on none; slices of time


class CoreUse(NamedTuple):
    """How one rank used its cores over some work. JSON-able."""

    host: str
    cores: list[int]  # that it may run on
    computes_on_them: bool  # else on a GPU
    load: float  # processes on the host that run or want to, for each of its cores
    seconds: float  # of the work
    waited: float  # seconds of these without a core, while ready to run; not a number where the kernel does not tell


def core_wait() -> float:
    """Seconds for which this thread has been ready to run without a core, since it began. Not a number where the kernel
    does not tell."""
    try:
        with open(_SCHEDULE, encoding="ascii") as file:
            running, waiting, _ = map(int, file.read().split())
    except (OSError, ValueError):
        return math.nan
    return waiting / 1e9 if running else math.nan  # all are 0 where the kernel does not count


def core_use(seconds: float, waited: float) -> CoreUse:
    """This rank's use of its cores. waited: the difference of two core_wait()."""
    cores = sorted(os.sched_getaffinity(0))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return CoreUse(platform.host(), cores, not platform.is_cuda(), load, seconds, waited)


def own_cores(context: ParallelContext) -> int:
    """The number of cores that this rank may run on, divided by the number of ranks that may. Collective."""
    here = (platform.host(), os.sched_getaffinity(0))
    everyone = gather_objects(here, context)
    num_sharing = sum(host == here[0] and not cores.isdisjoint(here[1]) for host, cores in everyone)
    return max(1, len(here[1]) // num_sharing)


def give_threads(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Let the optimizer's steps run on a number of the host's threads; all else runs on as many as before."""
    before = torch.get_num_threads()
    optimizer.register_step_pre_hook(lambda *_: torch.set_num_threads(number))
    optimizer.register_step_post_hook(lambda *_: torch.set_num_threads(before))


def unfit_hosts(uses: Sequence[CoreUse]) -> dict[str, str]:
    """Hosts whose ranks cannot be compared by their times, each with the reason. uses: of all ranks, by rank."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, use in enumerate(uses):
        ranks[use.host].append(rank)
    reasons = {host: _reason(members, uses) for host, members in ranks.items()}
    return {host: reason for host, reason in reasons.items() if reason}


def crowded_gpu_hosts(uses: Sequence[CoreUse]) -> list[str]:
    """A line for each host on which ranks that compute on GPUs have fewer cores than they are: what starts their
    kernels, reads their data and sends their messages waits. uses: of all ranks."""
    lines = []
    for host in dict.fromkeys(use.host for use in uses if not use.computes_on_them):
        members = [use for use in uses if use.host == host]
        cores = {core for use in members for core in use.cores}
        if len(members) > len(cores):
            lines.append(
                f"{_sharing(len(members), host, len(cores))}, though they compute on GPUs: give each some (Slurm: "
                "--exclusive, or --cpus-per-task for sbatch and srun)"
            )
    return lines


def own_seconds(use: CoreUse) -> float:
    """Seconds of the work, less those that were waited for a core."""
    return use.seconds - (0.0 if math.isnan(use.waited) else use.waited)


def _reason(ranks: list[int], uses: Sequence[CoreUse]) -> str:
    """Why the ranks of a host cannot be compared; empty where they can."""
    host = uses[ranks[0]].host
    computing = [rank for rank in ranks if uses[rank].computes_on_them]
    cores = {core for rank in computing for core in uses[rank].cores}
    if len(computing) > len(cores):
        return _sharing(len(computing), host, len(cores))
    longest = max(ranks, key=lambda rank: _share(uses[rank]))
    if _share(uses[longest]) > _SHARE:
        return (
            f"rank {longest} on {host} waited for a core for {_share(uses[longest]):.0%} of its time: others use them"
        )
    if any(math.isnan(uses[rank].waited) and uses[rank].load > 1 for rank in ranks):
        return f"the load of {host} is {uses[ranks[0]].load:.1f} processes a core"
    return ""


def _sharing(num_ranks: int, host: str, num_cores: int) -> str:
    return f"{num_ranks} ranks on {host} share {num_cores} core{'s' * (num_cores != 1)}"


def _share(use: CoreUse) -> float:
    """The share of the work's time that was waited for a core; 0 where it is not known."""
    return 0.0 if math.isnan(use.waited) or use.seconds <= 0 else use.waited / use.seconds
