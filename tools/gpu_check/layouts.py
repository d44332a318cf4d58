"""ZeRO 0 to 3, with and without offload, on one rank: in each type of numbers the same losses and gradient norms."""

from __future__ import annotations

import gc
import math
from typing import Any

from tools.gpu_check.measure import deterministic_kernels
from tools.gpu_check.outcome import Outcome, Setting
from tools.gpu_check.small_runs import begin, quickstart

NUM_STEPS = 3
PARALLEL = {
    "ZeRO 0": "{zero: 0}",
    "ZeRO 1": "{zero: 1}",
    "ZeRO 2": "{zero: 2}",
    "ZeRO 3": "{zero: 3}",
    "ZeRO 1, optimizer on the host": "{zero: 1, offload: optimizer}",
    "ZeRO 2, optimizer on the host": "{zero: 2, offload: optimizer}",
    "ZeRO 3, all on the host": "{zero: 3, offload: all}",
}
REFERENCE = "ZeRO 1"
# In one type, the first step takes norms of the same gradients in another order; later ones also see the rounding of
# AdamW's kernels, the host's and the device's, in the last of 24 bits of some weights.
SAME_FIRST = 1e-5
SAME_LATER = 1e-4
# In 16 bits such a last bit turns the rounding of one weight in 2^15 (bf16; in 2^13 in fp16), by a unit of its last
# place, 2^-8 of it (2^-11): some 2^-15.5 of the weights' norm (2^-17.5), and in the gradient's, which weights of all
# layers enter, some ten times that.
TURNED = {"fp32": 0.0, "bf16": 2.0**-12, "fp16": 2.0**-13}
# of the first step's norm to that in fp32: one rounding per operation that depth does not add up in one direction
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-6, "fp16": 2.0**-9}


def check(setting: Setting) -> Outcome:
    types = ("fp32", "bf16", "fp16") if setting.device == "cuda" else ("fp32", "bf16")
    figures: dict[str, Any] = {}
    faults = []
    exact = math.nan
    for dtype in types:
        with deterministic_kernels():
            steps = {name: trained(setting, dtype, parallel) for name, parallel in PARALLEL.items()}
        reference = steps[REFERENCE]
        exact = reference[0][1] if dtype == "fp32" else exact
        off = abs(reference[0][1] / exact - 1.0)
        figures[f"{dtype}, first gradient norm"] = reference[0][1]
        if not off <= ROUNDING[dtype]:
            faults.append(f"{dtype}: the first gradient norm is {off:.1e} off that in fp32, more than rounding")
        for name, found in steps.items():
            first, later = differences(found, reference)
            figures[f"{dtype}, {name}: differences from {REFERENCE} in the first step, later"] = [first, later]
            allowed = SAME_LATER + TURNED[dtype] * ("host" in name)
            if not (first <= SAME_FIRST and later <= allowed):
                faults.append(
                    f"{dtype}, {name}: losses or norms are {first:.1e} off those of {REFERENCE} in the first step, "
                    f"{later:.1e} later; allowed are {SAME_FIRST:.0e} and {allowed:.0e}"
                )
    return Outcome(figures, faults)


def trained(setting: Setting, dtype: str, parallel: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps."""
    overrides = [f"precision.dtype={dtype}", f"parallel={parallel}", "diffusion.t_sampler=uniform"]
    steps = begin(quickstart(setting.folder, setting.quick, overrides)).steps(0, NUM_STEPS)
    gc.collect()  # engines are rings of references
    return steps


def differences(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> tuple[float, float]:
    """The greatest relative difference of losses and norms (in the first step, in later ones)."""
    off = [max(abs(one / other - 1.0) for one, other in zip(*pair)) for pair in zip(found, wanted)]
    return off[0], max(off[1:])
