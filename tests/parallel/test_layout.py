"""Ranks on the grid, and stages cut evenly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.models.costs import layer_costs
from megatron_mdm.parallel.layout import AXES, Layout, partition
from tests.small import small_model


def test_ranks_are_numbered_tensor_fastest() -> None:
    layout = Layout.of(12, ParallelConfig(tensor=2, pipeline=3))
    assert (layout.data, layout.world_size) == (2, 12)
    places = [tuple(layout.index(rank, axis) for axis in ("pipeline", "data", "tensor")) for rank in range(12)]
    assert places == list(itertools.product(range(3), range(2), range(2)))


def test_every_axis_divides_the_ranks_into_groups() -> None:
    """Also the two that nothing uses yet: along an axis, peers differ in its index alone."""
    layout = Layout(pipeline=2, data=3, context=2, expert=2, tensor=2)
    assert layout.world_size == 48
    for axis in AXES:
        groups = {tuple(layout.peers(rank, axis)) for rank in range(48)}
        assert sorted(itertools.chain(*groups)) == list(range(48))
        for group in groups:
            assert [layout.index(rank, axis) for rank in group] == list(range(layout.degree(axis)))
            for other in set(AXES) - {axis}:
                assert len({layout.index(rank, other) for rank in group}) == 1


@pytest.mark.parametrize("num_parts", range(1, 7))
def test_partition_is_the_best_of_all(num_parts: int) -> None:
    costs = [0.0, 3.0, 1.0, 4.0, 1.0, 5.0]

    def worst(bounds: list[int]) -> float:
        return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))

    bounds = partition(costs, num_parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert all(start < stop for start, stop in itertools.pairwise(bounds))
    cuts = itertools.combinations(range(1, len(costs)), num_parts - 1)
    assert worst(bounds) == min(worst([0, *cut, len(costs)]) for cut in cuts)


def test_a_large_vocabulary_gets_a_stage_with_fewer_layers() -> None:
    model = small_model(num_layers=8, hidden_size=64, vocab_size=20_000)
    costs = layer_costs(model, 32)
    bounds = partition(costs, 2)
    blocks = [sum(1 for layer in range(start, stop) if 0 < layer < 9) for start, stop in itertools.pairwise(bounds)]
    assert blocks[0] > blocks[1]
    assert np.isclose(sum(costs), sum(costs[: bounds[1]]) + sum(costs[bounds[1] :]))
