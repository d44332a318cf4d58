"""A job that hangs ends by itself and names the rank and the place; one that is only slow does not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mdm.config.load import dump_config
from megatron_mdm.parallel.hang_report import Report, describe
from tests.ranks import ProgramRanks, ProgramResult
from tests.small import small_config, write_ids

HOST = socket.gethostname()
CRASHED = 70
HANG_SECONDS = 5.0
SECONDS = 45.0  # from the start to the end of the job, at most, on a busy machine

# Runs launch/train.py with a fault in step 4, on some of the ranks.
FAULTY = """
import os, runpy, signal, sys, time
import torch
import torch.distributed as dist
from megatron_mdm.data.loader import TrainLoader
from megatron_mdm.engine.zero import ZeroEngine
from megatron_mdm.training.loop import Trainer

rank, fault = int(os.environ["RANK"]), sys.argv[1]
sys.argv = ["launch/train.py", *sys.argv[2:]]
batch, step, prepare = TrainLoader.batch, Trainer.train_step, ZeroEngine._prepare

def slow_batch(self, number):
    if number == 3 and rank == 1:
        time.sleep(1000)
    return batch(self, number)

def step_with_stop(self, number):
    if number == 3 and rank == int(fault[-1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, number)

def step_with_mismatch(self, number):
    if number == 3 and rank == 0:
        dist.barrier()
    elif number == 3:
        dist.all_reduce(torch.ones(1000))
    return step(self, number)

def slow_prepare(self, inputs):
    time.sleep(0.6)
    return prepare(self, inputs)

if fault == "loader":
    TrainLoader.batch = slow_batch
elif fault.startswith("stopped"):
    Trainer.train_step = step_with_stop
elif fault == "mismatch":
    Trainer.train_step = step_with_mismatch
elif fault == "slow":
    ZeroEngine._prepare = slow_prepare
runpy.run_path("launch/train.py", run_name="__main__")
"""


def start(folder: Path, fault: str, ranks: int = 2, **sections: dict[str, object]) -> ProgramRanks:
    write_ids(folder / "train.jsonl", 20)
    config = small_config(folder, **{"faults": {"hang_minutes": HANG_SECONDS / 60}, **sections})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "faulty.py").write_text(FAULTY, encoding="utf-8")
    return ProgramRanks(str(folder / "faulty.py"), [fault, "--config", str(folder / "config.yaml")], ranks)


def message(results: list[ProgramResult]) -> str:
    """The line about the hang, which one rank prints and after which none prints anything."""
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, results
    assert "Traceback" not in "".join(result.stderr for result in results)
    return lines[0]


FAULTS = {"loader": 2, "mismatch": 3, "stopped1": 2, "stopped0": 2}  # with their ranks


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[ProgramResult], Path]]:
    """Each fault's results and run folder. The jobs start one after the other and hang side by side."""
    jobs = {}
    for fault, num_ranks in FAULTS.items():
        folder = tmp_path_factory.mktemp(fault)
        ranks = start(folder, fault, num_ranks, batch={"global_size": 12})
        jobs[fault] = ranks, folder / "run", time.monotonic() + SECONDS
        while ranks.is_running() and not (folder / "run/metrics.jsonl").exists():
            time.sleep(0.01)
    results = {}
    for fault, (ranks, folder, deadline) in jobs.items():
        stopped = [ranks.processes[int(fault[-1])]] if fault.startswith("stopped") else []
        for process in ranks.processes:
            if process not in stopped:
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode == CRASHED, fault
        for process in stopped:
            process.kill()  # as a launcher does in the end
        results[fault] = ranks.wait(), folder
    return results


Hung = dict[str, tuple[list[ProgramResult], Path]]


@pytest.mark.alone
def test_place_of_a_hang_is_named(hung: Hung) -> None:
    results, folder = hung["loader"]
    line = message(results)
    assert line.startswith(f"error: no progress for 5 s at step 4: rank 1 (host {HOST}) is in megatron_mdm/data/loader")
    assert line.endswith(f"; rank 0 waits for it in all_reduce; stacks: {folder / 'hangs'}")
    # The thread that reads ahead is what hangs; it is in the file.
    assert "slow_batch" in (folder / "hangs/rank-001.txt").read_text(encoding="utf-8")


@pytest.mark.alone
def test_ranks_in_different_collectives_are_named(hung: Hung) -> None:
    results, folder = hung["mismatch"]
    line = message(results)
    assert f"all ranks wait in collectives: rank 0 (host {HOST}) in barrier (faulty.py:" in line
    assert f"ranks 1, 2 (host {HOST}) in all_reduce (faulty.py:" in line
    for rank, collective in enumerate(["gloo:barrier", "gloo:all_reduce", "gloo:all_reduce"]):
        stacks = (folder / f"hangs/rank-{rank:03d}.txt").read_text(encoding="utf-8")
        assert "step_with_mismatch" in stacks
        record = json.loads((folder / f"hangs/rank-{rank:03d}.collectives.json").read_text(encoding="utf-8"))
        assert record["entries"][-1]["profiling_name"] == collective


@pytest.mark.alone
def test_stopped_rank_does_not_answer(hung: Hung) -> None:
    line = message(hung["stopped1"][0])
    assert "no progress for 5 s at step 4: " in line
    assert f"rank 1 (host {HOST}) does not answer; rank 0 waits for it in all_reduce; stacks: " in line


@pytest.mark.alone
def test_without_the_store_a_rank_speaks_for_itself(hung: Hung) -> None:
    """Without a launcher's agent, the job's store is rank 0's, and stops with it."""
    line = message(hung["stopped0"][0])
    assert line.startswith("error: rank 1: no progress for 5 s at step 4: it waits in ")
    assert line.endswith(" does not answer")


@pytest.mark.alone
def test_slow_run_goes_on(tmp_path: Path) -> None:
    """Calibration, validation and steps that each take longer than the limit, of parts that do not."""
    ranks = start(
        tmp_path,
        "slow",
        faults={"hang_minutes": 4.0 / 60},
        data={"validation_fraction": 0.4},
        diffusion={"t_sampler": "ppots", "calibration": {"initial_forwards": 32, "target_efficiency": 0.0}},
        batch={"global_size": 28},
        schedule={"steps": 1},
        evaluation={"every": 1, "num_times": 4},
    )
    results = ranks.wait()
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    calibration = json.loads((tmp_path / "run/calibration.json").read_text(encoding="utf-8"))
    assert calibration["seconds"] > 4.0
    assert not (tmp_path / "run/hangs").exists()


# A rank that hangs, with a recorder of collectives that fails.
RECORDERS = """
import sys, time
from pathlib import Path
from megatron_mdm.parallel.groups import initialize
from megatron_mdm.parallel.watchdog import watch

def raises():
    raise RuntimeError("no record")

def blocks():
    time.sleep(1000)

watch(Path(sys.argv[1]), 2.0 / 60, initialize(), {"raises": raises, "blocks": blocks}[sys.argv[2]])
time.sleep(1000)
"""


def test_a_recorder_that_fails_does_not_keep_the_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(RECORDERS, encoding="utf-8")
    jobs = {fault: ProgramRanks(str(program), [str(tmp_path / fault), fault]) for fault in ("raises", "blocks")}
    for fault, ranks in jobs.items():
        ranks.processes[0].join(SECONDS)
        assert ranks.processes[0].exitcode == CRASHED, fault
        (result,) = ranks.wait()
        line = message([result])
        assert f"no progress for 2 s at start: rank 0 (host {HOST}) is in program.py:14 <module>; stacks: " in line
        (written,) = (tmp_path / fault / "hangs").iterdir()
        assert "time.sleep(1000)" in written.read_text(encoding="utf-8")


# A program that ends while the watchdog waits for an answer of the store.
ENDING = """
import contextlib, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from megatron_mdm.parallel import watchdog
from megatron_mdm.parallel.groups import initialize
from megatron_mdm.parallel.program import run_program

def main():
    watchdog.watch(Path(sys.argv[1]), 10.0, initialize())
    end = time.monotonic() + float(sys.argv[2])

    def ask_until_the_end(store):
        store.set_timeout(timedelta(milliseconds=20))
        while time.monotonic() < end:
            with contextlib.suppress(dist.DistError):
                store.get("never")

    threading.Thread(target=watchdog._watchdog.board.ask, args=(ask_until_the_end,), daemon=True).start()
    time.sleep(0.2)
    print("trained", flush=True)

run_program(main)
"""


def test_a_program_ends_cleanly_while_the_store_is_asked(tmp_path: Path) -> None:
    """Whether the answer comes before the program stops waiting for it (1 s) or not. A question that fails while the
    interpreter ends would abort the process."""
    program = tmp_path / "program.py"
    program.write_text(ENDING, encoding="utf-8")
    jobs = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path), seconds],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seconds in ("1", "1000")
    ]
    for job in jobs:
        output, errors = job.communicate(timeout=SECONDS)
        assert (job.returncode, output) == (0, "trained\n"), errors


def report(collective: str = "", where: str = "f.py:1 f", host: str = "a", state: str = "") -> Report:
    return Report(host, "step 17", where, collective, state)


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        (
            [report("all_reduce")] * 3 + [report(where="data/loader.py:97 batch", host="b")],
            "rank 3 (host b) is in data/loader.py:97 batch; ranks 0, 1, 2 wait for it in all_reduce",
        ),
        (
            [report("recv"), report(host="b", state="silent"), *[report("all_reduce")] * 5],
            "rank 1 (host b) does not answer; rank 0 waits for it in recv; ranks 2–6 wait for it in all_reduce",
        ),
        (
            [report(state="silent"), report(host="b", state="silent"), report("barrier")],
            "ranks 0, 1 (hosts a, b) do not answer; rank 2 waits for them in barrier",
        ),
        (
            [report("all_reduce", "a.py:1 f"), report("barrier", "b.py:2 g"), report("barrier", "b.py:2 g", "b")],
            "all ranks wait in collectives: rank 0 (host a) in all_reduce (a.py:1 f), "
            "ranks 1, 2 (hosts a, b) in barrier (b.py:2 g)",
        ),
        ([report(where="x.py:1 x"), report(state="ended")], "rank 0 (host a) is in x.py:1 x; rank 1 has ended"),
    ],
)
def test_what_is_said_of_reports(reports: list[Report], said: str) -> None:
    assert describe(dict(enumerate(reports))) == said
