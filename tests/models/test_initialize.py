"""Initial weights do not depend on the layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from tests.ranks import run_ranks
from tests.small import small_model


def built_shards(model: ModelConfig, tensor: int) -> dict[str, Any]:
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.models.sharding import sharding_of
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(tensor=tensor))
    parameters = build_model(model, ParallelConfig(tensor=tensor), context, 7).named_parameters()
    return {name: (parameter.detach().numpy(), sharding_of(name)) for name, parameter in parameters}


def test_shards_are_cut_from_the_whole() -> None:
    import torch

    model = small_model()
    whole = run_ranks(built_shards, 1, model, 1)[0]
    shards = run_ranks(built_shards, 2, model, 2)
    for name, (full, sharding) in whole.items():
        for rank in range(2):
            mine, same = shards[rank][name]
            assert same == sharding
            expected = torch.from_numpy(full)
            if name.endswith(("word_embeddings.weight", "vocabulary_weight")):
                # Padding depends on the degree; the rows of real tokens do not.
                expected = torch.zeros(mine.shape[0] * 2, full.shape[1])
                expected[: model.vocab_size] = torch.from_numpy(full)[: model.vocab_size]
            np.testing.assert_array_equal(mine, sharding.shard(expected, rank, 2).numpy())
    spread = whole["1.layer.mlp.linear_fc1.weight"][0].std()
    assert abs(spread - model.init_std) < 0.1 * model.init_std
