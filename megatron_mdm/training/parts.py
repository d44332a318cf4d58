"""What differs between kinds of runs: where batches come from, and what watches them besides what watches every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.base import Engine
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.callbacks.base import Callback
from megatron_mdm.training.inputs import RunData
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.source import BatchSource


@dataclass(frozen=True)
class Run:
    """What a run has when its source and its callbacks are made."""

    config: RunConfig
    data: RunData
    context: ParallelContext
    engine: Engine
    artifact: dict[str, Any] | None  # the calibration, where the sampler needs one
    metrics: MetricsLog
    first_step: int = 0  # what was done before is in the folder
    first_batch: int = 0  # the one that step 0 takes, in the data's order

    @property
    def folder(self) -> Path:
        return Path(self.config.checkpoint.directory)


class RunParts(Protocol):
    """A kind of runs: training.build.Supervised, rl.run.Reinforced."""

    def checked(self, config: RunConfig, world_size: int) -> RunConfig:
        """The configuration with what the kind decides by itself. Raises UserError, with the remedy, where it does not
        go with the kind; nothing has been read yet."""
        ...

    def check_data(self, config: RunConfig, data: RunData) -> None:
        """Raise UserError where the data do not do."""
        ...

    def source(self, run: Run) -> BatchSource: ...

    def callbacks(self, run: Run, trainer: Trainer) -> Sequence[Callback]:
        """Besides those of every run. trainer: whose source is the one that this kind made."""
        ...
