"""launch/train.py, which ends itself by SIGKILL in a certain phase: run by tests/kill.py, never by hand.

The first argument is JSON: "phase", "occurrence" (from 1), "delay" (seconds from the phase's beginning), "ranks" (those
that die) and "log" (a folder, to which every rank writes what it was doing then, and how long its phases took).
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.store import CheckpointStore
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.rl.completions import Completions
from megatron_mdm.rl.judge import Judge
from megatron_mdm.rl.source import RolloutSource
from megatron_mdm.training.calibrate import Prepass
from megatron_mdm.training.loop import Trainer

PHASES: dict[str, tuple[type, str]] = {
    "calibration": (Prepass, "add"),
    "training": (Trainer, "train_step"),
    "saving": (CheckpointStore, "_write"),  # on a thread of its own
    "validation": (FixedGridValidation, "__call__"),
    "rollout": (Completions, "_responses"),
    "reward": (Judge, "_scores"),
    "old values": (RolloutSource, "_measured"),
}
PLAN = json.loads(sys.argv.pop(1))
RANK = int(os.environ["RANK"])
seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
active: dict[str, Any] = {}  # phase → the step that it belongs to
steps_done = 0


def log(name: str, value: Any) -> None:
    Path(PLAN["log"], f"{name}-{RANK}.json").write_text(json.dumps(value), encoding="utf-8")


def die() -> None:
    log("killed", {"active": dict(active), "steps_done": steps_done})
    os.kill(os.getpid(), signal.SIGKILL)


def watched(phase: str, method: Any) -> Any:
    calls = 0

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        global steps_done
        nonlocal calls
        calls += 1
        active[phase] = arguments[0] if phase in ("training", "saving") else calls
        if phase == "training":
            steps_done = arguments[0]
        if phase == PLAN["phase"] and calls == PLAN["occurrence"] and RANK in PLAN["ranks"]:
            timer = threading.Timer(PLAN["delay"], die)
            timer.daemon = True
            timer.start()
        began = time.monotonic()
        try:
            return method(self, *arguments, **named)
        finally:
            seconds[phase].append(time.monotonic() - began)
            active.pop(phase)
            if phase == "training":
                steps_done = arguments[0] + 1

    return call


for name, (owner, attribute) in PHASES.items():
    setattr(owner, attribute, watched(name, getattr(owner, attribute)))
try:
    runpy.run_path("launch/train.py", run_name="__main__")
finally:
    log("seconds", seconds)
