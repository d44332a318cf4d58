"""ZeRO 3 from the first layer on: each is partitioned as it is built, so that no rank ever holds the whole model."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn

from megatron_mdm.engine.inference import DTYPES
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ModelParallelUnit


def keep_partition(layer: nn.Module, dtype: str, unit: ModelParallelUnit, settings: dict[str, Any]) -> None:
    """Bring a layer to this rank's device, its parameters in the type that the model trains in, and keep of them the
    part that this data-parallel rank holds. Collective over the data-parallel ranks: the first one's values count.

    dtype: of precision.dtype. Buffers stay as they are. settings: DeepSpeed's configuration.
    """
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(platform.device(), DTYPES[dtype])
    layer.to(platform.device())
    group = unit.get_data_parallel_group()
    deepspeed.zero.Init(module=layer, data_parallel_group=group, config_dict_or_path=settings, mpu=unit)
