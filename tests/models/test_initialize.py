"""Initial weights do not depend on the layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.models.parameters import parameter_table
from tests.ranks import run_ranks
from tests.small import small_model


def built_shards(model: ModelConfig, tensor: int) -> dict[str, Any]:
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.models.naming import rows_of
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(tensor=tensor))
    built = build_model(model, ParallelConfig(tensor=tensor), context, 7)
    return {row.name: (parameter.detach().numpy(), row) for row, parameter in rows_of(built, model)}


def test_shards_are_cut_from_the_whole() -> None:
    import torch

    model = small_model()
    whole = run_ranks(built_shards, 1, model, 1)[0]
    shards = run_ranks(built_shards, 2, model, 2)
    assert whole.keys() == parameter_table(model).keys()
    for name, (full, row) in whole.items():
        for rank in range(2):
            mine, same = shards[rank][name]
            assert same == row
            expected = torch.from_numpy(full)
            split = row.split.get("tensor")
            if row.is_vocabulary:
                # Padding depends on the degree; the rows of real tokens do not.
                expected = torch.zeros(mine.shape[0] * 2, full.shape[1])
                expected[: model.vocab_size] = torch.from_numpy(full)[: model.vocab_size]
            np.testing.assert_array_equal(mine, split.shard(expected, rank, 2).numpy() if split else full)
    spread = whole["decoder.layers.0.mlp.linear_fc1.weight"][0].std()
    assert abs(spread - model.init_std) < 0.1 * model.init_std
