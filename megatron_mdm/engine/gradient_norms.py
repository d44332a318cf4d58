"""Norms of gradients of chosen batches, on any layout, before or between the steps of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_mdm.batch import ModelInputs
from megatron_mdm.engine.base import Engine


def gradient_norms(engine: Engine, batches: Iterable[Sequence[ModelInputs]]) -> list[float]:
    """The gradient norm of each global batch, before clipping; not finite where a loss or gradient is not. Collective.

    batches: the micro-batches of this data-parallel rank, as many on each. They are steps with a learning rate of 0,
    so that weights stay as they are, and Adam's moments are put back afterwards.
    """
    with engine.optimizer_state.moments_kept():
        return [engine.train_batch(micro_batches, lr=0.0).grad_norm for micro_batches in batches]
