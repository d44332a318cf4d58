"""Before anything is trained: is there room for checkpoints, do all nodes see the run's folder, do all groups work, is
a rank slow? What ranks must have alike is compared earlier, when they join: inputs.agreement."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from statistics import median
from typing import Any

from megatron_mdm.checkpoint.store import steps
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.models.parameters import checkpoint_bytes
from megatron_mdm.parallel import environment
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.cores import crowded_gpu_hosts, unfit_hosts
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.self_test import NEIGHBOURS, Outcome, message_bytes, self_test, slow_ranks
from megatron_mdm.training.inputs import package_folder, versions

PREFLIGHT = "preflight.json"
_GIB = 2**30
_SECONDS_TO_APPEAR = 60.0  # of a file on the other nodes: NFS may remember for so long that there is none


def preflight(config: RunConfig, checkpoints: Path, context: ParallelContext) -> None:
    """Check, print a few lines, and leave preflight.json in the run's folder. Collective.

    checkpoints: the folder that holds the run's. Raises UserError where not one checkpoint would fit on the disk, where
    a node has another disk, and where a group's results are wrong.
    """
    began = time.monotonic()
    folder = Path(config.checkpoint.directory)
    check_shared(folder, context)
    disk = check_room(config, folder, len(steps(checkpoints)), context)
    outcomes = self_test(context)
    slow = describe_slow(outcomes)
    if not context.is_main:
        return
    seconds = time.monotonic() - began
    for line in (*crowded_gpu_hosts([outcome.cores for outcome in outcomes]), *slow):
        print(f"warning: {line}", file=sys.stderr)
    print("\n".join(f"preflight: {line}" for line in describe(outcomes, disk, seconds)), flush=True)
    values = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    report = {
        "config (sha256)": hashlib.sha256(values.encode()).hexdigest(),
        "git commit": git_commit(),
        **versions(),
        "disk": disk,
        "seconds": round(seconds, 3),
        "message_bytes": message_bytes(),
        "slow": slow,
        "ranks": [{**outcome._asdict(), "cores": len(outcome.cores.cores)} for outcome in outcomes],
    }
    try:
        write_json(folder / PREFLIGHT, report)
    except OSError as error:
        print(f"warning: {folder / PREFLIGHT} cannot be written ({error.strerror})", file=sys.stderr)


def check_shared(folder: Path, context: ParallelContext, patience: float = _SECONDS_TO_APPEAR) -> None:
    """Raise UserError naming the nodes that do not see a file which the main rank puts into the folder. Collective."""
    token = folder / f".preflight-{uuid.uuid4().hex}"
    name: Any = gather_objects(token.name, context)[0]
    if context.is_main:
        token.touch()
    gather_objects(None, context)  # it is there
    sees = True
    if environment.number("LOCAL_RANK", 0) == 0:  # one rank of each node looks
        deadline = time.monotonic() + patience
        while not (sees := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
    answers: list[Any] = gather_objects((sees, os.uname().nodename), context)
    if context.is_main:
        token.unlink()
    blind = sorted({host for sees, host in answers if not sees})
    if blind:
        raise UserError(
            f"'checkpoint.directory' {folder} is not the same folder on {', '.join(blind)} as on {answers[0][1]}; "
            "every rank writes its part of a checkpoint there, so it must be on a disk that all nodes share"
        )


def check_room(config: RunConfig, folder: Path, num_checkpoints: int, context: ParallelContext) -> dict[str, int]:
    """Free bytes, and those a checkpoint takes. Warns where those that are kept, beside the one being written, do not
    fit; raises UserError where not one does. Collective; the main rank looks for all.

    num_checkpoints: those that the disk holds already.
    """
    found: Any = gather_objects(shutil.disk_usage(folder).free if context.is_main else 0, context)[0]
    size = checkpoint_bytes(config.model)
    kept = config.checkpoint.keep_last
    room = f"{folder}: {found / _GIB:.3g} GiB are free, and a checkpoint takes {size / _GIB:.3g} GiB"
    if found < size:
        raise UserError(f"{room}; make room, or set 'checkpoint.directory'")
    if found < size * max(1, kept + 1 - num_checkpoints) and context.is_main:
        print(f"warning: {room}: too little for 'checkpoint.keep_last' {kept} and the next", file=sys.stderr)
    return {"free_bytes": found, "checkpoint_bytes": size}


def describe(outcomes: list[Outcome], disk: dict[str, int], seconds: float) -> list[str]:
    """Lines on ranks and disk, and on each kind of group at its slowest rank."""
    hosts = {outcome.host for outcome in outcomes}
    ranks = _count(len(outcomes), "rank")
    nodes = _count(len(hosts), "host")
    free = disk["free_bytes"] // disk["checkpoint_bytes"]
    lines = [f"{ranks} on {nodes}; room for {free:,} checkpoints; {seconds:.2f} s"]
    groups = []
    for name in outcomes[0].latency:
        latency = max(outcome.latency[name] for outcome in outcomes)
        rate = message_bytes() / max(outcome.transfer[name] for outcome in outcomes)
        groups.append(f"{name} {latency * 1e3:.2f} ms, {rate / 1e9:.2f} GB/s")
    if groups:
        times = [outcome.compute for outcome in outcomes]
        slowest = max(range(len(times)), key=times.__getitem__)
        ratio = times[slowest] / median(times)
        lines.append("; ".join(groups))
        lines.append(f"slowest rank {slowest} on {outcomes[slowest].host}, {ratio:.2f} times the median's time")
    for reason in unfit_hosts([outcome.cores for outcome in outcomes]).values():
        lines.append(f"slow ranks are not named: {reason}")
    return lines


def describe_slow(outcomes: list[Outcome]) -> list[str]:
    """A line for each rank that computes, and for each test whose messages travel, markedly slower than the median of
    those that have cores for themselves."""
    unfit = unfit_hosts([outcome.cores for outcome in outcomes])
    fit = [rank for rank, outcome in enumerate(outcomes) if outcome.host not in unfit]
    lines = []
    tests = {"to compute": [outcome.compute for outcome in outcomes]}
    for name in outcomes[0].transfer:
        what = "messages between" if name == NEIGHBOURS else "all-reduces in the group"
        tests[f"for {what} {name}"] = [outcome.transfer[name] for outcome in outcomes]
    for what, times in tests.items():
        seconds = {rank: times[rank] for rank in fit}
        for rank in slow_ranks(seconds):
            ratio = seconds[rank] / median(seconds.values())
            lines.append(f"rank {rank} on {outcomes[rank].host} takes {ratio:.1f} times the median's time {what}")
    return lines


def git_commit() -> str:
    """The commit of the sources, where they are in a repository; "" elsewhere."""
    try:
        command = ["git", "-C", str(package_folder()), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
