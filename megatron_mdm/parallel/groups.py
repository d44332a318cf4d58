"""Joining the job, its process groups by axis of the layout, and the mpu that DeepSpeed asks for."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.parallel import environment, platform
from megatron_mdm.parallel.layout import Layout

_TIMEOUT_MINUTES = 30.0  # of a collective, and of the wait for other ranks to join the job
_SECONDS_TO_SPEAK = 20.0  # of that wait, after which a line says who waits, and where


class JoinError(Exception):
    """Ranks of the job are missing. Another start may find them."""


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place, and the groups it communicates in. Built once by initialize() and passed as an argument."""

    rank: int
    layout: Layout
    groups: Mapping[str, dist.ProcessGroup]  # by axis of the layout: the ranks that differ along it alone

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return self.groups["tensor"]

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.groups["data"]

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self.groups["pipeline"]

    @property
    def tensor_rank(self) -> int:
        return self.layout.index(self.rank, "tensor")

    @property
    def data_rank(self) -> int:
        return self.layout.index(self.rank, "data")

    @property
    def pipeline_rank(self) -> int:
        return self.layout.index(self.rank, "pipeline")

    @property
    def last_stage_rank(self) -> int:
        """The global rank of the last stage of this rank's pipeline."""
        return self.layout.peers(self.rank, "pipeline")[-1]

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes files for all."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Ranks that the launcher started (1 without a launcher); known before any process group exists."""
    return environment.number("WORLD_SIZE", 1)


def rank_from_environment() -> int:
    return environment.number("RANK", 0)


def initialize(
    parallel: ParallelConfig | None = None, agreement: Mapping[str, object] | None = None, hang_minutes: float = 0.0
) -> ParallelContext:
    """Join the job and build the groups of a layout. Without a launcher, the job is this one process.

    parallel: the degrees; without it, all ranks are data-parallel. agreement: values by name that must be the same on
    every rank, compared before any group is built. Raises UserError naming the rank and the value where they are not.
    hang_minutes: the watchdog's limit, which torch's own timeouts exceed, so that it speaks first.
    """
    timeout_minutes = max(_TIMEOUT_MINUTES, 2 * hang_minutes)
    join_job(timeout_minutes)
    if agreement:
        check_agreement(agreement)
    layout = Layout.of(dist.get_world_size(), parallel or ParallelConfig())
    return ParallelContext(dist.get_rank(), layout, _megatron_groups(layout, timeout_minutes))


def _megatron_groups(layout: Layout, timeout_minutes: float) -> dict[str, dist.ProcessGroup]:
    """Set megatron-core's global state, which its layers read, and take the groups from it: nothing else reads it."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():  # another layout in the same processes
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    for axis, group in groups.items():
        assert dist.get_process_group_ranks(group) == layout.peers(dist.get_rank(), axis), axis
    return groups


def check_agreement(values: Mapping[str, object]) -> None:
    """Raise UserError on every rank where one rank's values differ from the first's. Collective over the job."""
    everyone: list[tuple[str, Mapping[str, object]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(everyone, (platform.host(), dict(values)))
    first_host, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        for name in [*first, *(name for name in other if name not in first)]:
            if other.get(name) != first.get(name):
                raise UserError(
                    f"rank {rank} on {host} has {name} = {other.get(name)!r}, rank 0 on {first_host} has "
                    f"{first.get(name)!r}; start every rank with the same configuration, data, code and libraries"
                )


def join_job(timeout_minutes: float) -> None:
    """torch.distributed over the ranks that the launcher started. Raises UserError, or JoinError."""
    import deepspeed

    platform.prepare()
    environment.check_rank()
    if not environment.is_rank():
        environment.check_alone()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": _free_port()})
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if platform.is_cuda():  # of the groups that DeepSpeed makes, which would have 10 minutes
            dist.distributed_c10d.default_pg_nccl_timeout = timeout
        waiting = threading.Timer(_SECONDS_TO_SPEAK, _say_that_it_waits, (timeout_minutes,))
        waiting.daemon = True
        waiting.start()
        try:
            deepspeed.init_distributed(platform.communication_backend(), timeout=timeout, auto_mpi_discovery=False)
        except dist.DistError as error:
            raise JoinError(_why_not_joined(str(error))) from None
        finally:
            waiting.cancel()


def _why_not_joined(reason: str) -> str:
    host = environment.variable("MASTER_ADDR")
    port = environment.number("MASTER_PORT", 0)
    return environment.taken_port(reason, port) or (
        f"rank {rank_from_environment()} on {platform.host()} has not found the other ranks at {host}:{port} "
        f"(MASTER_ADDR, MASTER_PORT): {reason.splitlines()[0]}"
    )


def _say_that_it_waits(timeout_minutes: float) -> None:
    """A line from each host."""
    if environment.number("LOCAL_RANK", 0):
        return
    rank = rank_from_environment()
    size = world_size_from_environment()
    found = environment.describe_master(environment.variable("MASTER_ADDR"), environment.number("MASTER_PORT", 0))
    print(
        f"warning: rank {rank} on {platform.host()} waits for others of {size} ranks (WORLD_SIZE); {found}; it "
        f"gives up after {timeout_minutes:g} minutes",
        file=sys.stderr,
        flush=True,
    )


def has_joined() -> bool:
    """Whether this process is a rank of a job by now."""
    return dist.is_available() and dist.is_initialized()


def shut_down() -> None:
    """Leave the job in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


class ModelParallelUnit:
    """What deepspeed.initialize(mpu=…) asks, answered from a context."""

    def __init__(self, context: ParallelContext) -> None:
        self.context = context

    def get_model_parallel_rank(self) -> int:
        return self.context.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.context.layout.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.context.tensor_group

    # DeepSpeed asks for tensor parallelism by both names.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.context.layout.pipeline

    def get_data_parallel_rank(self) -> int:
        return self.context.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.context.layout.data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.context.data_group


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
