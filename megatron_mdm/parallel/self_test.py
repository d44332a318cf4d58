"""Does every group add up right, how fast is it, and is a rank slower than the others? A fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.cores import CoreUse, core_use, core_wait
from megatron_mdm.parallel.groups import ParallelContext

SLOW = 1.5  # times the median
NEIGHBOURS = "pipeline neighbours"  # point to point; the other tests are all-reduces and named after their group
_LATENCY_REPEATS = 10
_REPEATS = 3
_CHUNKS = 20
_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# of a chunk of compute
_MATRIX = {"cpu": 192, "cuda": 4096}
_PRODUCTS = {"cpu": 10, "cuda": 20}
_PATTERN = 64  # different values; their sums are exact in fp32


class Outcome(NamedTuple):
    """What one rank measured. Seconds; JSON-able."""

    host: str
    compute: float  # of a fixed number of matrix products, while all ranks do them
    cores: CoreUse  # meanwhile
    latency: dict[str, float]  # by test: of a message of one element
    transfer: dict[str, float]  # of a message of message_bytes()
    right: dict[str, bool]


def message_bytes() -> int:
    return _BYTES[platform.device().type]


def self_test(context: ParallelContext) -> list[Outcome]:
    """Every rank's outcome, by rank. Collective. Raises UserError naming the group and the ranks with wrong results."""
    layout = context.layout
    groups = {
        "world": (layout.world_size, None),
        "tensor": (layout.tensor, context.tensor_group),
        "data": (layout.data, context.data_group),
        "pipeline": (layout.pipeline, context.pipeline_group),
    }
    latency = {}
    transfer = {}
    right = {}
    for name, (size, group) in groups.items():
        if size > 1:
            outcome = _all_reduce(group)
            latency[name], transfer[name], right[name] = outcome
    if layout.pipeline > 1:
        outcome = _neighbours(context)
        latency[NEIGHBOURS], transfer[NEIGHBOURS], right[NEIGHBOURS] = outcome
    compute, cores = _compute()
    mine = Outcome(platform.host(), compute, cores, latency, transfer, right)
    outcomes: list[Any] = gather_objects(mine, context)
    for name in right:
        wrong = [rank for rank, outcome in enumerate(outcomes) if not outcome.right[name]]
        if wrong:
            named = ", ".join(f"rank {rank} on {outcomes[rank].host}" for rank in wrong)
            what = "messages between" if name == NEIGHBOURS else "sums in the group"
            raise UserError(f"self-test: {what} {name} are wrong on {named}; check their links and memory")
    return outcomes


def slow_ranks(seconds: dict[int, float]) -> list[int]:
    """Ranks that take more than SLOW times the median of all. seconds: by rank."""
    limit = SLOW * median(seconds.values()) if seconds else 0.0
    return [rank for rank, mine in seconds.items() if mine > limit]


def _all_reduce(group: dist.ProcessGroup | None) -> tuple[float, float, bool]:
    """(latency, seconds of a transfer, whether the sums are right)"""
    small = torch.ones(1, device=platform.device())
    latency = median(_timed(lambda: dist.all_reduce(small, group=group), _LATENCY_REPEATS))
    ranks = dist.get_world_size(group)
    tensor = pattern(dist.get_rank(group))
    dist.all_reduce(tensor, group=group)
    right = torch.equal(tensor, sum(pattern(rank) for rank in range(ranks)))  # type: ignore[arg-type]
    transfer = min(_timed(lambda: dist.all_reduce(tensor.zero_(), group=group), _REPEATS))
    return latency, transfer, right


def _neighbours(context: ParallelContext) -> tuple[float, float, bool]:
    """The same of messages from each pipeline stage to the next."""
    ranks = context.layout.peers(context.rank, "pipeline")
    stage = context.pipeline_rank

    def exchange(sent: Tensor, received: Tensor) -> None:
        messages = []
        if stage < len(ranks) - 1:
            messages.append(dist.P2POp(dist.isend, sent, ranks[stage + 1]))
        if stage > 0:
            messages.append(dist.P2POp(dist.irecv, received, ranks[stage - 1]))
        for message in dist.batch_isend_irecv(messages):
            message.wait()

    one = torch.ones(1, device=platform.device())
    latency = median(_timed(lambda: exchange(one, one.clone()), _LATENCY_REPEATS))
    mine = pattern(stage)
    received = torch.zeros_like(mine)
    exchange(mine, received)
    right = stage == 0 or torch.equal(received, pattern(stage - 1))
    return latency, min(_timed(lambda: exchange(mine, received), _REPEATS)), right


def pattern(rank: int) -> Tensor:
    """What a rank of a group contributes: message_bytes() of fp32, different for each rank and along the tensor."""
    size = message_bytes() // 4
    return (torch.arange(size, device=platform.device()) % _PATTERN + rank % _PATTERN + 1).float()


def _compute() -> tuple[float, CoreUse]:
    """(seconds of matrix products on this rank, whatever else its core or its GPU is doing included; its cores)"""
    kind = platform.device().type
    matrix = torch.ones(_MATRIX[kind], _MATRIX[kind], device=platform.device())
    if platform.is_cuda():
        matrix = matrix.bfloat16()

    def products() -> None:
        for _ in range(_PRODUCTS[kind]):
            matrix @ matrix

    began = time.perf_counter()
    waited = core_wait()
    seconds = sum(_timed(products, _CHUNKS))
    return seconds, core_use(time.perf_counter() - began, core_wait() - waited)


def _timed(action: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each time, after a first one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        action()
        platform.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
