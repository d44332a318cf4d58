"""How the nodes of a launch meet: what launch/torchrun.py adds to torchrun's own rendezvous."""

from __future__ import annotations

import sys
import threading
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic import metrics
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_min_max_nnodes

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel import environment, platform

_HERE = "127.0.0.1"
_DEFAULT_PORT = 29500
_SECONDS_TO_SPEAK = 20.0  # after which a node that waits for the others says so
_MET = "SimpleElasticAgent._rendezvous"  # torchrun's metrics of it begin so


@contextmanager
def meeting(arguments: Namespace) -> Iterator[None]:
    """Around torchrun's run(arguments): the meeting point is checked, and a line says where somebody waits for long.

    On one node without a port of the user's, it is a free one. Raises UserError where MASTER_ADDR has no address, or
    MASTER_PORT is no port.
    """
    nodes = _number_of_nodes(arguments)
    if nodes == 1 and not (arguments.rdzv_endpoint or arguments.master_port or arguments.standalone):
        arguments.rdzv_backend = "c10d"
        arguments.rdzv_endpoint = f"{_HERE}:0"
        arguments.rdzv_id = uuid.uuid4().hex
        arguments.rdzv_conf = "is_host=true"
        arguments.local_addr = arguments.local_addr or _HERE  # whatever its name leads to
    host, port = meeting_point(arguments)
    if arguments.rdzv_endpoint or nodes > 1:
        environment.check_host(host)
    waiting = threading.Timer(_SECONDS_TO_SPEAK, _say_that_it_waits, (nodes, host, port))
    waiting.daemon = True
    metrics.configure(_Cancel(waiting), "torchelastic")
    if nodes > 1:
        waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def meeting_point(arguments: Namespace) -> tuple[str, int]:
    """Host and port."""
    endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or _DEFAULT_PORT}"
    try:
        return parse_rendezvous_endpoint(endpoint, _DEFAULT_PORT)
    except ValueError as error:
        raise UserError(f"'{endpoint}' is no MASTER_ADDR:MASTER_PORT ({error})") from None


def why_not_met(error: BaseException, arguments: Namespace) -> str:
    """One line of torchrun's error and of those that led to it."""
    host, port = meeting_point(arguments)
    reasons = []
    cause = error
    while cause:
        reasons.append((str(cause) or type(cause).__name__).splitlines()[0])
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return environment.taken_port(" ".join(reasons), port) or (
        f"the nodes did not meet at {host}:{port} (MASTER_ADDR, MASTER_PORT), or lost each other: {reasons[-1]}"
    )


class _Cancel(metrics.MetricHandler):
    """The timer, as soon as the nodes have met."""

    def __init__(self, timer: threading.Timer) -> None:
        self.timer = timer

    def emit(self, metric_data: metrics.MetricData) -> None:
        if metric_data.name.startswith(_MET):
            self.timer.cancel()


def _number_of_nodes(arguments: Namespace) -> int:
    try:
        return parse_min_max_nnodes(arguments.nnodes)[1]
    except (ValueError, RuntimeError):
        raise UserError(f"NODES (--nnodes) is '{arguments.nnodes}', not a number") from None


def _say_that_it_waits(nodes: int, host: str, port: int) -> None:
    found = environment.describe_master(host, port)
    print(f"warning: {platform.host()} waits for others of {nodes} nodes (NODES); {found}", file=sys.stderr, flush=True)
