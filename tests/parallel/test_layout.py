"""Ranks on the grid, and stages cut evenly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_mdm.models.parameters import layer_costs
from megatron_mdm.parallel.layout import Layout, partition
from tests.small import small_model


def test_ranks_are_numbered_tensor_fastest() -> None:
    layout = Layout.of(12, tensor=2, pipeline=3)
    assert (layout.data, layout.world_size) == (2, 12)
    places = [(layout.pipeline_rank(rank), layout.data_rank(rank), layout.tensor_rank(rank)) for rank in range(12)]
    assert places == list(itertools.product(range(3), range(2), range(2)))


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
