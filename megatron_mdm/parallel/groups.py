"""Joining the job, its process groups by axis of the layout, and the mpu that DeepSpeed asks for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.parallel import environment, platform
from megatron_mdm.parallel.gpus import check_gpus
from megatron_mdm.parallel.layout import AXES, Layout
from megatron_mdm.parallel.process_groups import ProcessGroups
from megatron_mdm.parallel.single_rank import SINGLE

_TIMEOUT_MINUTES = 30.0  # of a collective, and of the wait for other ranks to join the job
_SECONDS_TO_SPEAK = 20.0  # of that wait, after which a line says who waits, and where
_groups: ProcessGroups | None = None  # of the job that this process has joined


class JoinError(Exception):
    """Ranks of the job are missing. Another start may find them."""


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place, and the groups it communicates in. Built once by initialize() and passed as an argument."""

    rank: int
    layout: Layout
    groups: Mapping[str, dist.ProcessGroup]  # by axis of the layout: the ranks that differ along it alone
    background: dist.ProcessGroup  # all ranks, over gloo, for a thread that communicates while the main one does
    # The ranks of "data" for what is on the host, so that ranks on CUDA exchange numbers without a wait for the device;
    # None: data_group takes it.
    host_data: dist.ProcessGroup | None = None

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
    rank = dist.get_rank()
    groups = {}
    for axis in AXES:
        for peers in _all_peers(layout, axis):
            group = group_of(peers)
            if rank in peers:
                groups[axis] = group
    _set_megatron_state(layout, rank, groups)
    return ParallelContext(rank, layout, groups, _job().background(), _host_data(layout, rank))


def group_of(ranks: Iterable[int]) -> dist.ProcessGroup:
    """The group of these ranks, whoever has asked for it first. Collective over the job: see ProcessGroups.of."""
    return _job().of(ranks)


def _job() -> ProcessGroups:
    assert _groups is not None, "this process has not joined a job"
    return _groups


def _set_megatron_state(layout: Layout, rank: int, groups: Mapping[str, dist.ProcessGroup]) -> None:
    """Set megatron-core's global state, which its layers read, to our groups.

    Its own initialize_model_parallel would make 65 groups for 8 ranks. What is left unset has no reader in the layers
    that models/spec.py builds: their ProcessGroupCollection takes None for it.
    """
    from megatron.core import parallel_state

    assert layout.context == layout.expert == 1, layout
    if parallel_state.is_initialized():  # another layout in the same processes
        parallel_state.destroy_model_parallel()
    tensor, data, pipeline = (groups[axis] for axis in ("tensor", "data", "pipeline"))
    state: dict[str, object] = {
        "_TENSOR_MODEL_PARALLEL_GROUP": tensor,
        "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": layout.peers(rank, "tensor"),
        "_PIPELINE_MODEL_PARALLEL_GROUP": pipeline,
        "_PIPELINE_GLOBAL_RANKS": layout.peers(rank, "pipeline"),
        "_DATA_PARALLEL_GROUP": data,
        "_DATA_PARALLEL_GROUP_WITH_CP": data,
        "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": data,
        "_DATA_PARALLEL_GLOBAL_RANKS": layout.peers(rank, "data"),
        "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": layout.peers(rank, "data"),
        "_CONTEXT_PARALLEL_GROUP": groups["context"],
        "_CONTEXT_PARALLEL_GLOBAL_RANKS": layout.peers(rank, "context"),
        "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": tensor,
        "_EXPERT_MODEL_PARALLEL_GROUP": groups["expert"],
        "_EXPERT_TENSOR_PARALLEL_GROUP": tensor,
        "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": tensor,
        "_EXPERT_DATA_PARALLEL_GROUP": data,
        "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": data,
    }
    for name, value in state.items():
        assert hasattr(parallel_state, name), f"megatron-core has no parallel_state.{name} any more"
        setattr(parallel_state, name, value)
    parallel_state._set_global_memory_buffer()


def _host_data(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    if not platform.is_cuda():
        return None
    groups = {peers: _job().on_host(peers) for peers in _all_peers(layout, "data")}
    return groups[tuple(layout.peers(rank, "data"))]


def _all_peers(layout: Layout, axis: str) -> list[tuple[int, ...]]:
    """The ranks of every group along an axis, in one order on all ranks."""
    return sorted({tuple(layout.peers(rank, axis)) for rank in range(layout.world_size)})


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
    """torch.distributed over the ranks that the launcher started, which DeepSpeed finds there. Raises UserError, or
    JoinError."""
    global _groups
    check_gpus()
    platform.prepare()
    environment.check_rank()
    if not environment.is_rank():
        environment.check_alone()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": _free_port()})
    if not dist.is_initialized():
        waiting = threading.Timer(_SECONDS_TO_SPEAK, _say_that_it_waits, (timeout_minutes,))
        waiting.daemon = True
        waiting.start()
        try:
            _meet(timedelta(minutes=timeout_minutes))
        except dist.DistError as error:
            raise JoinError(why_not_joined(error)) from None
        finally:
            waiting.cancel()
    if _groups is None or _groups.world is not dist.group.WORLD:
        _groups = ProcessGroups(timedelta(minutes=timeout_minutes))
        _give_deepspeed(_groups)


def _meet(timeout: timedelta) -> None:
    """Let this rank and the others find each other.

    No device is bound to the group: torch would then make a communicator for every group at once, used or not. Of all
    ranks together it is made here, so that what NCCL finds amiss is said here.
    """
    alone = world_size_from_environment() == 1
    dist.init_process_group(SINGLE if alone else platform.communication_backend(), timeout=timeout)
    if platform.is_cuda():
        dist.all_reduce(torch.zeros(1, device=platform.device()))
        platform.synchronize()


def _give_deepspeed(groups: ProcessGroups) -> None:
    """DeepSpeed's pipelines ask for 15 groups on 8 ranks, most of which are there."""
    import deepspeed

    deepspeed.init_distributed(platform.communication_backend(), timeout=groups.timeout, auto_mpi_discovery=False)
    deepspeed.comm.comm.cdb.new_group = groups.of


def why_not_joined(error: dist.DistError) -> str:
    """One line of what torch says; of what its backend says, all."""
    reason = str(error)
    host = environment.variable("MASTER_ADDR")
    port = environment.number("MASTER_PORT", 0)
    if isinstance(error, dist.DistBackendError):
        whole = " ".join(reason.split())
        return (
            f"rank {rank_from_environment()} on {platform.host()} has found the other ranks, but the connection to "
            f"them fails: {whole} (NCCL_DEBUG=INFO says more; INTERFACE names the network between nodes)"
        )
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
    global _groups
    _groups = None
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
