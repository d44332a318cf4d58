"""What a run carries from step to step and all its parts share. Data order and noise are functions of the step and need
no place here; what one callback alone needs is its own (callbacks/base.py)."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mdm.training.callbacks.base import Callbacks, State

# Format 1 held the callbacks' state among all else: which keys are whose.
_IN_FORMAT_1 = {
    "log": (
        "run_variance",
        "window_variance",
        "window_bins",
        "t_histogram",
        "control_variate",
        "adjusted_means",
        "run_adjusted_means",
    ),
    "validate": ("validations_without_best",),
    "refit": ("moment_sums", "cell_density"),
    "clipping": ("clipping",),
    "faults": ("recent_losses",),
}


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # of the samples trained on, without padding, one view of each
    best_validation: float = float("inf")
    best_step: int = -1  # of the validation with the least loss
    validated_step: int = -1  # the last validation's step …
    validation_loss: float = float("inf")  # … and loss
    num_skipped: int = 0  # steps without an update, since loss or gradient was infinite or not a number
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


def saved_state(state: TrainState, callbacks: Callbacks) -> dict[str, Any]:
    """What a checkpoint holds of both: a copy, as training continues while it is written."""
    return {"train": asdict(state), "callbacks": copy.deepcopy(callbacks.state_dict())}


def restored_state(saved: dict[str, Any]) -> tuple[TrainState, dict[str, State]]:
    """The training state in a checkpoint's content, and its callbacks' states by name."""
    train = saved["train"]
    state = TrainState(**{key: value for key, value in train.items() if key in TrainState.__dataclass_fields__})
    if "callbacks" in saved:
        return state, saved["callbacks"]
    return state, {name: {key: train[key] for key in keys if key in train} for name, keys in _IN_FORMAT_1.items()}
