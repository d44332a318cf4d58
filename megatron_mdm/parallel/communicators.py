"""NCCL's communicators: which ones a rank has, and the GPU memory that they take. Without one on a CPU."""

from __future__ import annotations

from megatron_mdm.parallel.layout import Layout

_MIB = 2**20
# Of a communicator once it has been used, as measured on 4 A100 with NVLink: NVIDIA/nccl#964.
PAIR_BYTES = 544 * _MIB
LARGER_BYTES = 688 * _MIB  # of three ranks or more
_AXES = ("tensor", "data", "pipeline")


def ranks_of_stage(layout: Layout, stage: int) -> tuple[int, ...]:
    """The ranks that hold a pipeline stage, or parts of it."""
    return tuple(rank for rank in range(layout.world_size) if layout.index(rank, "pipeline") == stage)


def groups_of(layout: Layout, rank: int, tied: bool, fp8: bool = False) -> set[tuple[int, ...]]:
    """The groups of several ranks in which a rank calls collectives, each with its ranks. A group of one rank has no
    communicator, and groups of the same ranks are one (process_groups.py).

    tied: whether the embedding's weights are also the vocabulary's, on another stage of a pipeline. fp8: whether layers
    multiply in it, whose scales the ranks of a stage agree on.
    """
    groups = {tuple(range(layout.world_size)), *(tuple(layout.peers(rank, axis)) for axis in _AXES)}
    if layout.pipeline > 1:  # DeepSpeed looks for overflows over all that share a model
        groups.add(
            tuple(sorted(peer for first in layout.peers(rank, "pipeline") for peer in layout.peers(first, "tensor")))
        )
    stages = layout.peers(rank, "pipeline")
    if tied and rank in (stages[0], stages[-1]):
        groups.add((stages[0], stages[-1]))
    if fp8:
        groups.add(ranks_of_stage(layout, layout.index(rank, "pipeline")))
    return {group for group in groups if len(set(group)) > 1}


def num_neighbours(layout: Layout, rank: int) -> int:
    """The stages before and behind a rank's, with each of which NCCL gives messages a communicator of their own."""
    stage = layout.index(rank, "pipeline")
    return (stage > 0) + (stage < layout.pipeline - 1)


def communicator_bytes(layout: Layout, stage: int, tied: bool, fp8: bool = False) -> int:
    """Bytes of a GPU that the communicators of a rank of a pipeline stage take."""
    rank = stage * layout.stride("pipeline")
    sizes = [len(group) for group in groups_of(layout, rank, tied, fp8)] + [2] * num_neighbours(layout, rank)
    return sum(PAIR_BYTES if size == 2 else LARGER_BYTES for size in sizes)
