"""The interface that training, calibration, evaluation and generation use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_mdm.engine.clock import PhaseClock
from megatron_mdm.engine.master import MasterState
from megatron_mdm.models.stages import Packet, RowStatistics


class TrainOutput(NamedTuple):
    statistics: list[RowStatistics]  # one per micro-batch of this data-parallel rank
    grad_norm: float  # of the global batch's gradient, before clipping; not finite: the step was skipped on every rank


class Forward(Protocol):
    """The half of an engine that measures losses."""

    def evaluate(self, packets: Sequence[Packet], row_gradients: bool = False) -> list[RowStatistics]:
        """Forward only; row_gradients: with RowStatistics.gradient_square. Several packets at once keep a pipeline's
        stages busy."""
        ...


class Engine(Forward, Protocol):
    """A model with its optimizer on this rank. All calls are collective: every rank makes them in the same order."""

    master: MasterState
    clock: PhaseClock  # of train_batch, by the caller's resets

    def train_batch(self, packets: Sequence[Packet], lr: float) -> TrainOutput:
        """One optimizer step on the sum of the packets' totals over all data-parallel ranks."""
        ...

    def logits(self, packet: Packet) -> Tensor:
        """Logits [N, V] of the selected positions, in the order of packet.selected.nonzero()."""
        ...
