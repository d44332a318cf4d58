"""torch.compile of a block, as an option: `model.compile`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKEND = "inductor"


def compiled(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, compiled anew for every shape that it is called with: there must be few (engine/inputs.py).

    megatron-core warns of its own calls in the midst of its layers. What is compiled leaves the warnings out, since
    they would cut it in pieces, one for each matrix.
    """
    settings: Any = torch._dynamo.config
    getattr(settings, "ignore_logging_functions", settings.reorderable_logging_functions).add(warnings.warn)
    return torch.compile(layer, dynamic=False, backend=BACKEND)
