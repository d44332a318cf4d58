"""What a run carries from step to step. Data order and noise are functions of the step and need no place here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_mdm.diffusion.variance import BatchMeans, OnlineVariance


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # of the samples trained on, without padding, one view of each
    run_variance: OnlineVariance = field(default_factory=OnlineVariance)  # over the whole run
    window_variance: OnlineVariance = field(default_factory=OnlineVariance)  # since the last log line
    # by tenths of t, since the last log line: sums of losses, and their numbers
    window_bins: list[list[float]] = field(default_factory=lambda: [[0.0] * 10, [0.0] * 10])
    best_validation: float = float("inf")
    best_step: int = -1  # of the validation with the least loss
    validations_without_best: int = 0
    t_histogram: list[int] = field(default_factory=lambda: [0] * 10)
    moment_sums: list[list[list[float]]] = field(default_factory=list)  # re-fitting: both halves of the steps; recent
    cell_density: list[float] = field(default_factory=list)  # the re-fitted p(t); empty: the calibration's
    control_variate: dict[str, Any] = field(default_factory=dict)  # diffusion.ema's, by its kind
    clipping: list[float] = field(default_factory=list)  # the adaptive clipped schedule's interval
    adjusted_means: BatchMeans = field(default_factory=BatchMeans)  # of the adjusted loss, since the last log line
    run_adjusted_means: BatchMeans = field(default_factory=BatchMeans)
    validated_step: int = -1  # the last validation's step …
    validation_loss: float = float("inf")  # … and loss
    num_skipped: int = 0  # steps without an update, since loss or gradient was infinite or not a number
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)  # which a spike is judged by
    skipped_batches: int = 0  # of the data, since a loss jumped in them: step s takes batch s + skipped_batches
    num_rewinds: int = 0
    rewinding: bool = False  # go back to the newest checkpoint before the next step
    stop_reason: str = ""  # not empty: stop before the next step
    interrupted: bool = False  # stopped by a signal, to be resumed: what belongs to the end of a run is left out
    failure: str = ""  # stopped by a fault: the error that the program ends with

    @property
    def num_updates(self) -> int:
        """Steps that the optimizer has taken."""
        return self.step - self.num_skipped

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainState:
        value = {key: item for key, item in value.items() if key in cls.__dataclass_fields__}
        for name in ("run_variance", "window_variance"):
            value[name] = OnlineVariance.of_state(value[name])
        for name in ("adjusted_means", "run_adjusted_means"):
            value[name] = BatchMeans(**value[name])
        return cls(**value)
