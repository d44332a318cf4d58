"""Steps of the 125M configuration as torch's profiler sees them: how long the device waits between kernels, and how
often the host waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_mdm.parallel import platform
from megatron_mdm.training.loop import Trainer
from tools.benchmarks.cases import Method
from tools.gpu_check.outcome import Outcome, Setting, skipped
from tools.gpu_check.pretraining import Pretraining

WARM_UPS = 3
STEPS = 2
MOST_SYNCHRONISATIONS = 1  # for the gradient's norm, by which the step is skipped or taken; losses come with it
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LONG_GAP = 10_000  # nanoseconds: about what it takes to start two kernels
NUM_SITES = 10
_OF_THE_STEPS = "the steps"


class Gaps(NamedTuple):
    """Between the first and the last of a device's kernels and copies."""

    busy: float  # share of the time
    num_long: int
    longest: float  # nanoseconds
    total: float  # nanoseconds, of all gaps


def check(setting: Setting) -> Outcome:
    if setting.device == "cpu":
        return skipped("it is about a GPU's kernels")
    trainer = Pretraining("125m", setting).trainer(Method(views=2))
    for step in range(WARM_UPS):
        trainer.train_step(step)
    sites = synchronising_lines(trainer, WARM_UPS)
    platform.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler, record_function(_OF_THE_STEPS):
        for step in range(WARM_UPS + 1, WARM_UPS + 1 + STEPS):
            trainer.train_step(step)
    recorded = profiler.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    events = recorded.kineto_results.events()
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    began, ended = next(
        (event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name() == _OF_THE_STEPS
    )
    # The profiler itself waits for the device when it ends.
    calls = Counter(
        event.name() for event in events if event.name() in SYNCHRONISING and began <= event.start_ns() < ended
    )
    gaps = gaps_between(spans)
    waits = sum(calls.values()) / STEPS
    figures: dict[str, Any] = {
        "share of the time that the device is busy": gaps.busy,
        "gaps of more than 10 µs in a step": gaps.num_long / STEPS,
        "longest gap, ms": gaps.longest / 1e6,
        "all gaps of a step, ms": gaps.total / 1e6 / STEPS,
        "kernels and copies of a step": len(spans) / STEPS,
        "synchronisations of a step": waits,
        "by call": {name: number / STEPS for name, number in calls.items()},
        "lines that wait for the device, in one step": [f"{number} × {line}" for line, number in sites],
    }
    faults = []
    if waits > MOST_SYNCHRONISATIONS:
        where = "; ".join(f"{number} at {line}" for line, number in sites)
        faults.append(
            f"the host waits for the device {waits:g} times a step, {MOST_SYNCHRONISATIONS} is meant: {where}"
        )
    return Outcome(figures, faults)


def synchronising_lines(trainer: Trainer, step: int) -> list[tuple[str, int]]:
    """The lines of Python at which a step waits for the device, as torch itself warns of them, most often first."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Switching the warnings on is warned of, too.
    waits = [warning for warning in told if "called a synchronizing" in str(warning.message)]
    places = Counter(f"{warning.filename}:{warning.lineno}" for warning in waits)
    return places.most_common(NUM_SITES)


def gaps_between(spans: Iterable[Sequence[float]]) -> Gaps:
    """spans: (start, end) in nanoseconds of what a device did, in any order, also at the same time."""
    ordered = sorted((start, end) for start, end in spans)
    if not ordered:
        return Gaps(0.0, 0, 0.0, 0.0)
    first, until = ordered[0]
    gaps = []
    for start, end in ordered:
        if start > until:
            gaps.append(start - until)
        until = max(until, end)
    total = float(sum(gaps))
    whole = until - first
    return Gaps(
        1.0 - total / whole if whole else 1.0, sum(gap > LONG_GAP for gap in gaps), max(gaps, default=0.0), total
    )
