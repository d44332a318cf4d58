"""What a rank holds of the parameters while its model is built."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.models.parameters import num_parameters, parameter_table
from tests.ranks import run_ranks
from tests.small import small_config, small_model

MODEL = small_model(num_layers=6, hidden_size=64, num_kv_heads=4, ffn_hidden_size=128, vocab_size=256)


class LiveParameters(TorchDispatchMode):
    """Follows the elements of every parameter that an operation takes or makes, whole or ZeRO 3's part."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, nn.Parameter):
                self.found.setdefault(id(leaf), weakref.ref(leaf))
        self.found = {key: found for key, found in self.found.items() if found() is not None}
        self.peak = max(self.peak, sum(self._elements(found()) for found in self.found.values()))
        return result

    @staticmethod
    def _elements(parameter: Any) -> int:
        if parameter is None:
            return 0
        partition = getattr(parameter, "ds_tensor", None)
        return parameter.numel() + (partition.numel() if partition is not None else 0)


def peak_while_building(configs: list[RunConfig]) -> list[int]:
    """On a rank: the most elements of parameters that were alive at a time, for each configuration."""
    from megatron_mdm.engine.build import build_engine
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    peaks = []
    for config in configs:
        with LiveParameters() as live:
            build_engine(config, context)
        peaks.append(live.peak)
    return peaks


@pytest.mark.parametrize("tied", [False, True])
def test_zero3_never_holds_more_than_a_layer_whole(tied: bool, tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"tie_embeddings": tied})
    rows = parameter_table(model).values()
    layers = [sum(row.size for row in rows if layer in row.layers) for layer in range(model.num_layers + 2)]
    whole = num_parameters(model)
    configs = [
        small_config(tmp_path, model=model.model_dump(), parallel=parallel, precision={"dtype": dtype})
        for parallel, dtype in (
            ({"zero": 2}, "fp32"),
            ({"zero": 3}, "fp32"),
            ({"zero": 3}, "bf16"),
            ({"zero": 3, "offload": "all"}, "fp32"),
        )
    ]
    for zero2, *zero3 in run_ranks(peak_while_building, 2, configs):
        assert zero2 >= whole
        assert max(zero3) <= 1.01 * (whole / 2 + max(layers))
