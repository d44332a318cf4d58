"""The 125M configuration with compiled blocks (`model.compile`) and plain ones: the same loss, and the time of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_mdm.parallel import platform
from tools.benchmarks.cases import Method
from tools.benchmarks.measure import interleaved
from tools.gpu_check.outcome import Outcome, Setting, skipped
from tools.gpu_check.pretraining import Pretraining

REPEATS = 3
# Relative, of a step's mean over thousands of tokens: what roundings to bf16 leave of it, in another order and number
SAME_LOSS = 2e-3


def check(setting: Setting) -> Outcome:
    if setting.device == "cpu":
        return skipped("it is about the code that is generated for a GPU")
    trainers = {
        name: Pretraining("125m", setting, compile_blocks).trainer(Method())
        for name, compile_blocks in (("plain", False), ("compiled", True))
    }
    losses = {}
    figures: dict[str, Any] = {}
    for name, trainer in trainers.items():
        began = time.perf_counter()
        losses[name] = trainer.train_step(0).loss
        figures[f"{name}: seconds of the first step"] = time.perf_counter() - began
    difference = abs(losses["compiled"] / losses["plain"] - 1.0)
    figures["relative difference of the first loss"] = difference

    def stepper(name: str) -> Callable[[int], None]:
        def step(index: int) -> None:
            trainers[name].train_step(index)
            platform.synchronize()

        return step

    seconds = interleaved({name: stepper(name) for name in trainers}, REPEATS, "steps")
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    figures |= {f"{name}: seconds of a step": median for name, median in medians.items()}
    figures["step time, compiled / plain"] = medians["compiled"] / medians["plain"]
    faults = []
    if not difference <= SAME_LOSS:
        faults.append(f"the first loss is {losses['compiled']:.6f} compiled, {losses['plain']:.6f} plain")
    return Outcome(figures, faults)
