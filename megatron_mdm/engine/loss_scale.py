"""fp16's dynamic loss scale: it decides which steps are skipped, so a run resumes from it as well."""

from __future__ import annotations

from typing import Any

_FIELDS = {  # a checkpoint's names → those of DeepSpeed's DynamicLossScaler
    "scale": "cur_scale",
    "steps": "cur_iter",
    "last_skipped_step": "last_overflow_iter",  # −1: none
    "skips_before_lowering": "cur_hysteresis",
}


class LossScale:
    """The loss scale of one DeepSpeed engine, the same on every rank. In other types than fp16 there is none."""

    def __init__(self, optimizer: object) -> None:
        """optimizer: engine.optimizer, DeepSpeed's wrapper or torch's own."""
        scaler = getattr(optimizer, "loss_scaler", None)
        self._scaler: Any = scaler if getattr(scaler, "dynamic", False) else None

    def state(self) -> dict[str, float]:
        """For JSON; empty where there is none."""
        return {name: getattr(self._scaler, field) for name, field in _FIELDS.items()} if self._scaler else {}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a state. Checkpoints of other types have an empty one, which leaves the scale as it is."""
        for name, value in state.items():
            if self._scaler:
                setattr(self._scaler, _FIELDS[name], value)
