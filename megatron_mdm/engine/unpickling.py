"""DeepSpeed's checkpoints are pickles, and it reads them with weights_only=False; here they cannot run code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_ALLOWED = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def safe_unpickling() -> Iterator[None]:
    """Within it, DeepSpeed's checkpoint loader admits tensors, plain containers and DeepSpeed's few own types only."""

    def load(_: Any, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location=map_location, weights_only=True)

    loader = torch_checkpoint_engine.TorchCheckpointEngine
    original = loader.load
    loader.load = load
    try:
        yield
    finally:
        loader.load = original
