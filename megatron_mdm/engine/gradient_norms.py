"""Norms of gradients of chosen batches, on any layout, before or between the steps of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_mdm.engine.base import Engine
from megatron_mdm.models.stages import Packet


def gradient_norms(engine: Engine, batches: Iterable[Sequence[Packet]]) -> list[float]:
    """Of each global batch, before clipping; not finite where a loss or gradient is not. Collective.

    batches: the packets of this data-parallel rank, as many on each. They are steps with a learning rate of 0, so that
    weights stay as they are, and Adam's moments are put back afterwards.
    """
    with engine.master.moments_kept():
        return [engine.train_batch(packets, lr=0.0).grad_norm for packets in batches]
