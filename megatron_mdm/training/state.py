"""What a run carries from step to step. Data order and noise are functions of the step and need no place here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_mdm.diffusion.variance import OnlineVariance


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done
    run_variance: OnlineVariance = field(default_factory=OnlineVariance)  # over the whole run
    window_variance: OnlineVariance = field(default_factory=OnlineVariance)  # since the last log line
    best_validation: float = float("inf")
    validations_without_best: int = 0
    t_histogram: list[int] = field(default_factory=lambda: [0] * 10)
    moment_sums: list[list[list[float]]] = field(default_factory=list)  # of both halves of the steps (re-fitting)
    cell_density: list[float] = field(default_factory=list)  # the re-fitted p(t); empty: the calibration's
    control_variate: dict[str, Any] = field(default_factory=dict)  # BinwiseControlVariate's state
    clipping: list[float] = field(default_factory=list)  # the adaptive clipped schedule's interval
    adjusted_variance: OnlineVariance = field(default_factory=OnlineVariance)  # of the loss less its control variate
    stop_reason: str = ""  # not empty: stop before the next step

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainState:
        value = dict(value)
        for name in ("run_variance", "window_variance", "adjusted_variance"):
            value[name] = OnlineVariance(**value[name])
        return cls(**value)
