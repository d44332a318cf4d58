"""The interface that training, calibration, evaluation and generation use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor, nn

from megatron_mdm.batch import IdRange, ModelInputs, RowStatistics
from megatron_mdm.engine.clock import PhaseClock
from megatron_mdm.engine.loss_scale import LossScale

if TYPE_CHECKING:  # DeepSpeed, which programs that train nothing do without
    from megatron_mdm.engine.optimizer_state import OptimizerState

# Fills the parameters of a layer or of several, all of them: in place of random initial weights, which are not drawn
# then. Called with what this rank holds, in the layers' order.
Load = Callable[[nn.Module], None]


class TrainOutput(NamedTuple):
    statistics: list[RowStatistics]  # one per micro-batch of this data-parallel rank, on the host
    grad_norm: float  # of the global batch's gradient, before clipping; not finite: the step was skipped on every rank


class Forward(Protocol):
    """The half of an engine that measures losses."""

    def evaluate(self, micro_batches: Sequence[ModelInputs], row_gradients: bool = False) -> list[RowStatistics]:
        """Forward only; row_gradients: with RowStatistics.gradient_square. Several micro-batches at once keep the
        stages of a pipeline busy."""
        ...

    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        """Cross-entropies [R, S] float32, on the host, of this data-parallel rank's micro-batches, one or more: 0 where
        a position is not selected. Forward only, by the kernels of train_batch's forward pass and without dropout: for
        the same micro-batches and weights they are those that it trains on, on a CPU to the last bit."""
        ...


class Engine(Forward, Protocol):
    """A model with its optimizer on this rank. All calls are collective: every rank makes them in the same order."""

    optimizer_state: OptimizerState
    loss_scale: LossScale
    clock: PhaseClock  # of train_batch, by the caller's resets

    def train_batch(self, micro_batches: Sequence[ModelInputs], lr: float) -> TrainOutput:
        """One optimizer step on the sum of the inputs' totals over all data-parallel ranks."""
        ...

    def logits(self, inputs: ModelInputs, *, ids: IdRange | None = None) -> Tensor:
        """Logits [N, V] of the selected positions, in the order of inputs.selected.nonzero(). ids: of these tokens
        only, [N, count]; the others' are not computed."""
        ...
