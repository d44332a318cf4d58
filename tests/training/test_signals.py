"""SIGTERM or SIGUSR1 to a single rank: all save after the same step, end in order, and resume to the last bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import ProgramRanks, run_program_ranks
from tests.training.test_resume import losses, write_config

LAYOUTS = {
    "zero2": (2, {"zero": 2}),
    "tp2_pp2": (4, {"zero": 1, "tensor": 2, "pipeline": 2}),
}


@pytest.mark.parametrize(("name", "number"), [("zero2", signal.SIGTERM), ("tp2_pp2", signal.SIGUSR1)])
def test_signalled_and_resumed_run_equals_undisturbed(name: str, number: signal.Signals, tmp_path: Path) -> None:
    num_ranks, parallel = LAYOUTS[name]
    config = write_config(tmp_path, parallel, "fp32")

    def arguments(run: str, *more: str) -> list[str]:
        settings = ["checkpoint.save_every=0", "schedule.steps=24", "evaluation.every=7", "logging.every=4"]
        return ["--config", str(config), f"checkpoint.directory={tmp_path / run}", *settings, *more]

    whole = run_program_ranks("launch/train.py", arguments("whole"), num_ranks)
    assert whole[0].exit_code == 0, whole[0].stderr
    ranks = ProgramRanks("launch/train.py", arguments("stopped"), num_ranks)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while ranks.is_running() and not (metrics.exists() and '"step": 4,' in metrics.read_text(encoding="utf-8")):
        time.sleep(0.005)
    os.kill(ranks.processes[-1].pid, number)
    results = ranks.wait()
    assert [result.exit_code for result in results] == [0] * num_ranks, results[0].stderr
    assert f"stopped by {number.name}; resume with --resume" in results[0].stdout
    (saved,) = os.listdir(tmp_path / "stopped" / "checkpoints")
    assert 4 <= int(saved.removeprefix("step-")) < 24, "stopped too late to show anything"

    resumed = run_program_ranks("launch/train.py", arguments("stopped", "--resume"), num_ranks)
    assert resumed[0].exit_code == 0, resumed[0].stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_signal_during_calibration_keeps_the_calibration(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"zero": 1}, "fp32")

    def arguments(run: str, *more: str) -> list[str]:
        settings = ["diffusion.calibration.initial_forwards=2048", "checkpoint.save_every=0"]
        return ["--config", str(config), f"checkpoint.directory={tmp_path / run}", *settings, *more]

    whole = run_program_ranks("launch/train.py", arguments("whole"), 2)
    assert whole[0].exit_code == 0, whole[0].stderr
    ranks = ProgramRanks("launch/train.py", arguments("stopped"), 2)
    pid = ranks.processes[0].pid
    while ranks.is_running() and not catches(pid, signal.SIGTERM):
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    results = ranks.wait()
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    assert os.listdir(tmp_path / "stopped/checkpoints") == ["step-00000001"]
    calibrated = (tmp_path / "stopped/calibration.json").read_bytes()

    resumed = run_program_ranks("launch/train.py", arguments("stopped", "--resume"), 2)
    assert resumed[0].exit_code == 0, resumed[0].stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert (tmp_path / "stopped/calibration.json").read_bytes() == calibrated


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of the signal, by the kernel's own word."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
