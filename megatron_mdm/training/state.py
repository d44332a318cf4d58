"""What a run carries from step to step and all its parts share. Data order and noise are functions of the step and need
no place here; what one callback alone needs is its own (callbacks/base.py)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from megatron_mdm.training.callbacks.base import Callbacks, State
from megatron_mdm.training.source import BatchSource

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
    num_skipped: int = 0  # steps without an update, since loss or gradient was infinite or not a number …
    num_empty: int = 0  # … or since nothing in them had a gradient
    skipped_batches: int = 0  # of the data, since a loss jumped in them: step s takes batch s + skipped_batches
    num_rewinds: int = 0
    rewinding: bool = False  # go back to the newest checkpoint before the next step
    stop_reason: str = ""  # not empty: stop before the next step
    interrupted: bool = False  # stopped by a signal, to be resumed: what belongs to the end of a run is left out
    failure: str = ""  # stopped by a fault: the error that the program ends with

    @property
    def num_updates(self) -> int:
        """Steps that the optimizer has taken."""
        return self.step - self.num_skipped - self.num_empty


class SavedState(NamedTuple):
    """What a checkpoint holds of a run's parts."""

    callbacks: dict[str, State]  # by name
    source: State
    arrays: Mapping[str, NDArray[Any]]  # the source's, in a file of their own

    @classmethod
    def of(cls, callbacks: Callbacks, source: BatchSource) -> SavedState:
        """A copy, as training continues while it is written."""
        states = copy.deepcopy((callbacks.state_dict(), source.state_dict()))
        return cls(*states, source.state_arrays())


def saved_state(state: TrainState, parts: SavedState) -> dict[str, Any]:
    """What a checkpoint's state holds of training, JSON-able: all but the arrays."""
    return {"train": asdict(state), "callbacks": parts.callbacks, "source": parts.source}


def restored_state(saved: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> tuple[TrainState, SavedState]:
    """The training state in a checkpoint's content, and its parts' states. arrays: the source's, in the checkpoint."""
    train = saved["train"]
    state = TrainState(**{key: value for key, value in train.items() if key in TrainState.__dataclass_fields__})
    if "callbacks" in saved:
        return state, SavedState(saved["callbacks"], saved["source"], arrays)
    of_callbacks = {name: {key: train[key] for key in keys if key in train} for name, keys in _IN_FORMAT_1.items()}
    return state, SavedState(of_callbacks, {}, {})
