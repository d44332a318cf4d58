"""A job whose kernel never ends is ended by its watchdog, with its line and its stacks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import initialize
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.parallel.watchdog import HANGS, watch
from tools.gpu_check.outcome import Outcome, Setting

LIMIT = 3.0  # seconds without progress
PATIENCE = 32.0  # for the process: its imports, the limit, and what the watchdog takes to speak
CYCLES = 10**13  # of a device's clock: more than an hour
EXIT_CODE = 70  # of a program that hangs: megatron_mdm/parallel/watchdog.py


def check(setting: Setting) -> Outcome:
    command = [sys.executable, "-m", "tools.gpu_check.watchdog", str(setting.folder)]
    began = time.monotonic()
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Outcome({}, [f"a process whose kernel never ends was not ended within {PATIENCE:.0f} s"])
    figures: dict[str, Any] = {"seconds from start to end": time.monotonic() - began, "exit code": result.returncode}
    told = [line for line in result.stderr.splitlines() if "no progress for" in line]
    figures["what it said"] = told[-1] if told else ""
    faults = []
    if result.returncode != EXIT_CODE or not told:
        last = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        faults.append(f"it ended with {result.returncode} instead of {EXIT_CODE}, and said last: {last}")
    if not list((setting.folder / HANGS).glob("rank-*.txt")):
        faults.append(f"no stacks in {setting.folder / HANGS}")
    return Outcome(figures, faults)


def spin(folder: Path) -> None:
    """Never return: wait for a kernel that spins; without a GPU, sleep."""
    context = initialize()
    watch(folder, LIMIT / 60.0, context)
    enter("a kernel that never ends")
    if platform.is_cuda():
        torch.cuda._sleep(CYCLES)
        torch.cuda.synchronize()
    time.sleep(PATIENCE)


if __name__ == "__main__":
    platform.quiet_libraries()
    spin(Path(sys.argv[1]))
