"""Checks in processes of their own, each killed at its limit: one that crashes or hangs costs the others nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.outcome import OUTCOME, Outcome

LOG = "log.txt"  # in a check's folder: what it printed
_TAIL = 300  # characters of the last line of it that a report quotes


@dataclass(frozen=True)
class Record:
    """How one check ended. JSON-able."""

    name: str
    what: str
    verdict: str  # passed, failed or skipped
    seconds: float
    faults: list[str] = field(default_factory=list)
    skipped: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def run_check(name: str, what: str, command: Sequence[str], seconds: float, folder: Path) -> Record:
    """Run a command that leaves its Outcome in the folder; what it prints is left there, too.

    It and all that it started are killed after so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME).unlink(missing_ok=True)
    began = time.monotonic()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(0.0, seconds))
            over_time = False
        except subprocess.TimeoutExpired:
            over_time = True
        finally:
            _kill_group(process)
    elapsed = time.monotonic() - began
    if over_time:
        fault = f"killed after {seconds:.0f} s, its limit; its output: {folder / LOG}"
        return Record(name, what, "failed", elapsed, [fault])
    if code or not (folder / OUTCOME).exists():
        fault = f"crashed with exit code {code}: {_last_line(folder / LOG)}; its output: {folder / LOG}"
        return Record(name, what, "failed", elapsed, [fault])
    outcome = Outcome.read(folder)
    verdict = "skipped" if outcome.skipped else "failed" if outcome.faults else "passed"
    return Record(name, what, verdict, elapsed, outcome.faults, outcome.skipped, outcome.figures)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it still runs, and what it left running in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-_TAIL:] if lines else "it printed nothing"
