"""The gradient's norm read from the device once a step, where DeepSpeed's optimizers read it several times."""

from __future__ import annotations

import sys
from typing import Any

import torch
from deepspeed.runtime import utils
from torch import Tensor


def read_norm_once(optimizer: Any) -> None:
    """Hand an optimizer of DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py) its norms on
    the host.

    By itself it asks the device whether any gradient is infinite, whether the norm is, and that again for each group of
    parameters; each answer waits for the device. A norm that is finite says that every gradient is, and one on the host
    answers at once. Clipping then multiplies by a number of the host. torch's own optimizers stay as they are.
    """
    library: Any = sys.modules[type(optimizer).__module__]
    for module in (library, utils):
        if hasattr(module, "mask_nan_or_inf_with_val_inplace"):
            module.mask_nan_or_inf_with_val_inplace = _mask_where_infinite
    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        norm = optimizer.scaled_global_norm

        def on_host(*arguments: Any, **named: Any) -> Tensor:
            return norm(*arguments, **named).cpu()

        optimizer.scaled_global_norm = on_host
        optimizer.check_overflow = _left_to_the_norm
    elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
        norms = optimizer._get_norm_groups

        def all_on_host() -> list[Tensor]:
            return list(torch.stack(norms()).cpu())

        optimizer._get_norm_groups = all_on_host
        optimizer.check_overflow = _left_to_the_norm
    elif hasattr(library, "get_global_norm_of_tensors"):  # ZeRO 1 in bf16 with gradients in fp32
        library.get_global_norm_of_tensors = _norm_on_host


def _norm_on_host(*arguments: Any, **named: Any) -> Tensor:
    return utils.get_global_norm_of_tensors(*arguments, **named).cpu()


def _mask_where_infinite(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """As DeepSpeed's, whose value is a tensor that is copied to the device first, while all waits."""
    norm.masked_fill_(~norm.isfinite(), val)


def _left_to_the_norm(*_: Any, **__: Any) -> None:
    """In place of a look at every gradient."""
