"""Time and memory on a device, and how far numbers are off."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Of a type: the greatest relative error, in the norm of a tensor, that is rounding. A result has passed three or four
# roundings of at most half a unit in the last place each (products are summed in fp32); fp32 has long sums beside.
ROUNDING = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
MIB = 2**20


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in fp64."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Inside, the same kernels give the same bits, where torch has such: attention's backward pass adds up in any order
    else. torch warns of those that it lacks. Enter it before anything is computed on the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads at its first call
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def timed(action: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call, the mean of several, until the device is done."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def peak_memory(action: Callable[[], Any], device: str) -> dict[str, float]:
    """A figure: the most that tensors take on the device during a call beyond what they took before. On the CPU, where
    that is not counted, none."""
    if device == "cpu":
        return {}
    _wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    _wait(device)
    return {"peak MiB": (torch.cuda.max_memory_allocated() - before) / MIB}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
