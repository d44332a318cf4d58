"""Two network namespaces joined by a virtual cable stand for two nodes; launch/torchrun.sh runs on each."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mdm.config.load import dump_config
from tests.ranks import run_program_ranks
from tests.small import small_config, small_model, write_ids
from tests.training.test_resume import losses

SECONDS = 240.0
LAYOUTS = {"tp2_dp2": ["parallel.tensor=2"], "pp2_dp2": ["parallel.pipeline=2"]}
STEPS = {"tp2_dp2": 8, "pp2_dp2": 32}  # the latter is killed after 6


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces with the addresses 10.77.0.1 and 10.77.0.2 on mdm0 and mdm1."""
    names = [f"mdm{node}-{os.getpid()}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here ({getattr(error, 'stderr', b'') or error})")
    try:
        ends = ["mdm0", "netns", names[0], "type", "veth", "peer", "name", "mdm1", "netns", names[1]]
        ip("link", "add", *ends)
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", f"mdm{node}")
            ip("-n", name, "link", "set", f"mdm{node}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            kill_all(name)
            ip("netns", "del", name)


def kill_all(name: str) -> None:
    """SIGKILL to every process of a node."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-9", *pids], check=False, capture_output=True)


def write_config(folder: Path, steps: int) -> Path:
    write_ids(folder / "train.jsonl", 30)
    config = small_config(
        folder,
        model=small_model().model_dump(),
        parallel={"zero": 1},
        schedule={"steps": steps},
        checkpoint={"directory": str(folder / "run"), "save_every": 4},
    )
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def start(name: str, node: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """launch/torchrun.sh with two ranks on a node."""
    variables = {
        "PYTHONPATH": os.getcwd(),
        **{"NODES": "2", "NODE_RANK": str(node), "RANKS_PER_NODE": "2", "MASTER_ADDR": "10.77.0.1"},
        **{"LOCAL_ADDR": f"10.77.0.{node + 1}", "INTERFACE": f"mdm{node}", "RESTART_SECONDS": "1"},
    }
    command = ["ip", "netns", "exec", name, "bash", "launch/torchrun.sh", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, env={**os.environ, **variables}, stdout=file, stderr=file)


@pytest.mark.parametrize(("name", "killed"), [("tp2_dp2", False), ("pp2_dp2", True)])
def test_two_nodes_train_as_one(name: str, killed: bool, nodes: list[str], tmp_path: Path) -> None:
    """killed: all processes of the second node, in the middle, after which it is restarted."""
    steps = STEPS[name]
    single = run_program_ranks(
        "launch/train.py",
        ["--config", str(write_config(tmp_path, steps)), f"checkpoint.directory={tmp_path / 'single'}", *LAYOUTS[name]],
        4,
    )
    assert single[0].exit_code == 0, single[0].stderr
    arguments = ["--config", str(tmp_path / "config.yaml"), *LAYOUTS[name]]
    log = tmp_path / "log"
    jobs = [start(namespace, node, arguments, log) for node, namespace in enumerate(nodes)]
    metrics = tmp_path / "run/metrics.jsonl"
    if killed:
        deadline = time.monotonic() + SECONDS
        while not (metrics.exists() and '"step": 6,' in metrics.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.02)
        kill_all(nodes[1])
        jobs[1].wait()
        assert f'"step": {steps},' not in metrics.read_text(encoding="utf-8"), "killed too late to show anything"
        jobs[1] = start(nodes[1], 1, arguments, log)
    codes = [job.wait(timeout=SECONDS) for job in jobs]
    output = log.read_text(encoding="utf-8")
    assert codes == [0, 0], output
    assert ("trying again" in output and "resumed from" in output) == killed
    records = losses(tmp_path / "run")
    expected = losses(tmp_path / "single")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert records == expected
