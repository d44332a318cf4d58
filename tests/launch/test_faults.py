"""Ranks that die or disagree: every rank stops within a minute, and somebody says why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mdm.config.load import dump_config
from tests.ranks import run_program_ranks
from tests.small import small_config, small_model, write_ids

SECONDS = 60.0
HOST = socket.gethostname()
TRY_AGAIN = 75  # launch/torchrun.py's code where another start may do

# Runs launch/train.py with one rank's arguments or fate changed.
WRAPPER = """
import os, runpy, signal, sys
rank = int(os.environ["RANK"])
fault, sys.argv = sys.argv[1], ["launch/train.py", *sys.argv[2:]]
if rank == 1 and "=" in fault:
    sys.argv.append(fault)
if rank == 1 and fault == "dies":
    from megatron_mdm.training.loop import Trainer
    step = Trainer.train_step
    def train_step(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)
    Trainer.train_step = train_step
runpy.run_path("launch/train.py", run_name="__main__")
"""


def write_job(folder: Path, fault: str) -> list[str]:
    """The program, and its arguments."""
    write_ids(folder / "train.jsonl", 20)
    write_ids(folder / "other.jsonl", 20, seed=1)
    (folder / "config.yaml").write_text(dump_config(small_config(folder)), encoding="utf-8")
    (folder / "wrapper.py").write_text(WRAPPER, encoding="utf-8")
    return [str(folder / "wrapper.py"), fault.format(folder=folder), "--config", str(folder / "config.yaml")]


def launched(folder: Path, fault: str) -> tuple[int, str, float]:
    """(exit code, all output, seconds) of a job of two ranks under launch/torchrun.py."""
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "launch/torchrun.py", "--nproc-per-node", "2", *write_job(folder, fault)],
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    return result.returncode, result.stdout + result.stderr, time.monotonic() - began


@pytest.mark.parametrize(
    ("fault", "cause", "expected_code"),
    [
        ("dies", "rank 1 was ended by SIGKILL", TRY_AGAIN),
        ("optimizer.lr=0.5", f"rank 1 on {HOST} has optimizer.lr = 0.5, rank 0 on {HOST} has 0.003", 1),
        ("data.train={folder}/absent.jsonl", "rank 1: error: ", 1),
    ],
)
def test_job_stops_and_names_the_cause(fault: str, cause: str, expected_code: int, tmp_path: Path) -> None:
    code, output, seconds = launched(tmp_path, fault)
    assert code == expected_code
    assert cause in output, output
    assert seconds < SECONDS


def test_ranks_stop_where_one_has_other_data(tmp_path: Path) -> None:
    program, *arguments = write_job(tmp_path, "data.train={folder}/other.jsonl")
    began = time.monotonic()
    results = run_program_ranks(program, arguments, 2)
    assert [result.exit_code for result in results] == [1, 1]
    assert f"rank 1 on {HOST} has data.train = " in "".join(result.stderr for result in results)
    assert time.monotonic() - began < SECONDS


def test_same_path_with_other_contents_is_noticed(tmp_path: Path) -> None:
    """As on nodes whose local copies differ: the fingerprint tells."""
    from megatron_mdm.training.inputs import agreement, resolve

    config = small_config(tmp_path)
    write_ids(tmp_path / "train.jsonl", 20)
    first = agreement(*resolve(config))
    write_ids(tmp_path / "train.jsonl", 20, seed=1)
    second = agreement(*resolve(config))
    assert {name for name in first if first[name] != second[name]} == {"training data (sha256)"}


def test_layout_check(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 30)
    config = small_config(tmp_path, model=small_model(num_layers=4).model_dump(), diffusion={"t_sampler": "ppots"})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "batch.micro_size=4"]
    arguments = ["--config", str(tmp_path / "config.yaml"), "--layout-check", *layout]
    results = run_program_ranks("launch/train.py", arguments, 4)
    assert [result.exit_code for result in results] == [0] * 4, results[0].stderr
    assert "smallest layout: tensor 1 × pipeline 1 × data 4" in results[0].stdout
    assert "layout check passed" in results[0].stdout
    assert not (tmp_path / "run").exists()
