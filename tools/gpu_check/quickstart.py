"""Twenty steps of the quickstart's model, method and batches on this device against the same on the CPU, in fp32; and
in bf16, which only has to follow.

The calibration is the CPU's in both: what it stops at depends on the last digits of losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_mdm.config.files import write_json
from megatron_mdm.parallel import platform
from tools.benchmarks.measure import OF_THE_JOB
from tools.gpu_check.outcome import Outcome, Setting
from tools.gpu_check.small_runs import begin, quickstart

NUM_STEPS = 20
FEW_STEPS = 3
SAME = 1e-5  # relative, of the first step: sums of fp32 numbers in another order
FOLLOWS = 1e-3  # of later ones: Adam's first steps turn the last digits of small gradients into whole steps
FOLLOWS_BF16 = 0.02
_CPU = "cpu.json"


def check(setting: Setting) -> Outcome:
    expected = on_cpu(setting)
    artifact = f"diffusion.calibration.artifact={setting.folder / 'run' / 'calibration.json'}"
    figures: dict[str, Any] = {}
    faults = []
    for dtype, bounds in (("fp32", (SAME, FOLLOWS)), ("bf16", (FOLLOWS_BF16, FOLLOWS_BF16))):
        config = quickstart(setting.folder, setting.quick, [f"precision.dtype={dtype}", artifact])
        found = begin(config).steps(0, len(expected))
        for quantity, name in enumerate(("loss", "gradient norm")):
            off = [abs(mine[quantity] / theirs[quantity] - 1.0) for mine, theirs in zip(found, expected)]
            figures[f"{dtype}, {name}: relative difference in the first step"] = off[0]
            figures[f"{dtype}, {name}: greatest relative difference"] = max(off)
            if dtype == "bf16" and name == "gradient norm":
                continue  # of single steps, it need not follow
            if not (off[0] <= bounds[0] and max(off) <= bounds[1]):
                faults.append(
                    f"{dtype}: {name} differs from the CPU's fp32 by {off[0]:.1e} in the first step and by "
                    f"{max(off):.1e} at most; allowed are {bounds[0]:.0e} and {bounds[1]:.0e}"
                )
        figures[f"{dtype}, loss"] = [loss for loss, _ in found]
    figures["CPU, fp32, loss"] = [loss for loss, _ in expected]
    return Outcome(figures, faults)


def on_cpu(setting: Setting) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps on the CPU, where need be in a process that sees no GPU."""
    if not platform.is_cuda():
        run(setting.folder, setting.quick)
    else:
        command = [sys.executable, "-m", "tools.gpu_check.quickstart", str(setting.folder), str(int(setting.quick))]
        own = {name: value for name, value in os.environ.items() if name not in OF_THE_JOB}  # it is a job of its own
        subprocess.run(command, env={**own, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}, check=True)
    steps = json.loads((setting.folder / _CPU).read_text(encoding="utf-8"))
    return [(loss, norm) for loss, norm in steps]


def run(folder: Path, quick: bool) -> None:
    """Train in fp32; leave losses and norms, and the calibration, in the folder."""
    started = begin(quickstart(folder, quick, ["precision.dtype=fp32"]))
    write_json(folder / _CPU, started.steps(0, FEW_STEPS if quick else NUM_STEPS))


if __name__ == "__main__":
    platform.quiet_libraries()
    run(Path(sys.argv[1]), sys.argv[2] == "1")
