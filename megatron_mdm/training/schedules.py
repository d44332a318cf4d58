"""Learning rate as a pure function of the step, so that nothing has to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_mdm.config.schema import ScheduleConfig


def _linear(progress: float, _: ScheduleConfig) -> float:
    return 1.0 - progress


def _cosine(progress: float, _: ScheduleConfig) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(_: float, __: ScheduleConfig) -> float:
    return 1.0


def _warmup_stable_decay(progress: float, schedule: ScheduleConfig) -> float:
    """Constant, then linear decay over the last decay_fraction of the steps after warm-up (Hu et al. 2024)."""
    return min(1.0, (1.0 - progress) / schedule.decay_fraction)


# progress in [0, 1] after warm-up → share of the way from the final to the peak learning rate
SCHEDULES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _warmup_stable_decay,
}


def learning_rate(step: int, num_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up to the peak, then the schedule to min_lr_ratio."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, num_steps - schedule.warmup_steps)
    share = SCHEDULES[schedule.name](min(1.0, progress), schedule)
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * share)
