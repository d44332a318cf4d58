"""How fast the configurations for 125M and 1B parameters train on this GPU, how much memory they take, and what the
methods cost."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_mdm.engine.memory import fullest_stage
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.speed import GIB, Speed
from tools.benchmarks.cases import Method
from tools.benchmarks.measure import interleaved
from tools.gpu_check.outcome import Outcome, Setting
from tools.gpu_check.pretraining import Pretraining, configuration

MODELS = ("125m", "1b")
METHODS = {"standard": Method(), "P-POTS": Method(t_sampler="ppots"), "MIRROR": Method(views=2)}
# A step's time relative to the standard one's: what the benchmark `steps` asks for on the CPU, and 3 % for the clock
LARGEST_RATIO = {"P-POTS": 1.05, "MIRROR": 2.11}
REPEATS = 3
# A plan says that a run fits where it leaves so much (training/plan/cluster.py): the peak may be above it by that
MARGIN = 1.05
MARGIN_GIB = 3.0


def check(setting: Setting) -> Outcome:
    figures: dict[str, Any] = {}
    faults: list[str] = []
    for name in MODELS:
        planned = planned_gib(name, setting)
        if setting.device == "cuda" and planned > platform.memory_bytes() / GIB:
            here = platform.memory_bytes() / GIB
            figures[name] = f"not run: its plan is {planned:.1f} GiB, and this GPU has {here:.1f}"
            continue
        figures[name] = measured(Pretraining(name, setting), setting)
        figures[name]["planned memory, GiB"] = planned
        if not setting.quick:
            faults += [f"{name}: {fault}" for fault in faults_of(figures[name])]
        gc.collect()  # the engine, which is a ring of references
    return Outcome(figures, faults)


def planned_gib(name: str, setting: Setting) -> float:
    config = configuration(name, setting)
    return fullest_stage(config, Layout.of(1, config.parallel), setting.device).total / GIB


def measured(pretraining: Pretraining, setting: Setting) -> dict[str, Any]:
    """Figures of one model. Steps of the methods take turns."""
    config = pretraining.config
    speed = Speed(config.model, platform.peak_flops(torch.bfloat16))
    trainers = {method: pretraining.trainer(settings) for method, settings in METHODS.items()}

    def stepper(method: str) -> Callable[[int], None]:
        def step(index: int) -> None:
            result = trainers[method].train_step(index)
            platform.synchronize()
            if method == "standard":
                speed.add(result)

        return step

    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steppers = {method: stepper(method) for method in METHODS}
    seconds = interleaved(steppers, 1 if setting.quick else REPEATS, "steps")
    medians = {method: float(np.median(values)) for method, values in seconds.items()}
    tokens = config.batch.global_size * config.data.max_length
    figures: dict[str, Any] = {
        "tokens/s": tokens / medians["standard"],
        "tokens of a step": tokens,
        "seconds of a step": medians["standard"],
    }
    if speed.peak_flops:
        figures["MFU"] = speed.flops / speed.num_steps / medians["standard"] / speed.peak_flops
    if setting.device == "cuda":
        figures["peak memory, GiB"] = platform.peak_memory_bytes() / GIB
    for method in LARGEST_RATIO:
        figures[f"step time, {method} / standard"] = medians[method] / medians["standard"]
    return figures


def faults_of(figures: dict[str, Any]) -> list[str]:
    """Where a model's figures are not what is promised of them."""
    faults = []
    peak = figures.get("peak memory, GiB", 0.0)
    planned = figures["planned memory, GiB"]
    if peak > MARGIN * planned + MARGIN_GIB:
        faults.append(f"takes {peak:.1f} GiB, its plan is {planned:.1f}")
    for method, largest in LARGEST_RATIO.items():
        ratio = figures[f"step time, {method} / standard"]
        if not ratio <= largest:
            faults.append(
                f"a step with {method} takes {ratio:.3f} times the standard one; at most {largest} is expected"
            )
    return faults
