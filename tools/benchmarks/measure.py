"""How the benchmark `steps` measures: interleaved timings, ratios of medians, peak memory of a process, the machine."""

from __future__ import annotations

import json
import os
import platform as machine
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mdm.parallel.progress import progress_bar

NUM_WARM_UPS = 1
_MEMORY_PREFIX = "memory: "
OF_THE_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")


def interleaved(
    variants: Mapping[str, Callable[[int], Any]],
    repeats: int,
    what: str,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Seconds of each variant's steps. A round runs every variant's step of the same number, beginning with another
    variant each time; the first rounds are warm-up and are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for step in progress_bar(range(NUM_WARM_UPS + repeats), desc=what, unit="round"):
        for name in order[step % len(order) :] + order[: step % len(order)]:
            began = clock()
            variants[name](1 + step)  # step 0 was the comparison of losses
            elapsed = clock() - began
            if step >= NUM_WARM_UPS:
                seconds[name].append(elapsed)
    return seconds


def compare(
    name: str, slow: Sequence[float], fast: Sequence[float], bound: str, target: float | None
) -> dict[str, Any]:
    """median(slow) / median(fast), the quartiles of the ratios of single rounds, and whether the target is met.

    bound: ">=" or "<=", how the ratio has to stand to the target, if there is one.
    """
    value = float(np.median(slow) / np.median(fast))
    low, middle, high = np.quantile(np.array(slow) / np.array(fast), [0.25, 0.5, 0.75])
    result = {
        "what": name,
        "ratio": value,
        "rounds_quartiles": [float(low), float(middle), float(high)],
        "target": "none",
    }
    if target is not None:
        result["target"] = f"{bound} {target:g}"
        result["met"] = value >= target if bound == ">=" else value <= target
    return result


def peak_memory(arguments: Sequence[str]) -> dict[str, float]:
    """What the benchmark `steps` reports from a process of its own, with arguments that make it call report_memory."""
    command = [sys.executable, "-m", "tools.benchmarks", "steps", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_JOB}  # it is its own job
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in result.stdout.splitlines():
        if line.startswith(_MEMORY_PREFIX):
            return json.loads(line.removeprefix(_MEMORY_PREFIX))
    raise RuntimeError(f"the memory measurement {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")


def report_memory(libraries: float, num_parameters: int) -> None:
    """Print this process's memory for peak_memory, in MiB. libraries: resident memory before the model was built.

    Weights, gradients and AdamW's state are 16 bytes a parameter in fp32 (4 + 4 + 8) and in bf16 (2 + 2 + 12) alike.
    """
    peak = resident_mib("VmHWM")
    states = 16 * num_parameters / 2**20
    values = {"peak": peak, "libraries": libraries, "states": states, "beyond": peak - libraries - states}
    print(_MEMORY_PREFIX + json.dumps(values), flush=True)


def resident_mib(field: str = "VmRSS") -> float:
    """VmRSS: now; VmHWM: at most, since this program began. (getrusage's ru_maxrss starts from the parent's.)"""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine_info() -> dict[str, Any]:
    model = machine.processor()
    flags = set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return {
        "cpu": model,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "python": machine.python_version(),
    }
