"""Versions of the libraries, what torch says of the device, and the signatures by which the code calls them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megatron_mdm.parallel import platform
from tools.gpu_check.outcome import Outcome, Setting

OLDEST_TORCH = (2, 11)
LIBRARIES = ("deepspeed", "megatron-core", "transformers", "triton", "transformer-engine", "liger-kernel")
# what the code passes beside the first arguments: an absent one is a fault, but where the code does without (OPTIONAL)
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "torch.nn.functional.scaled_dot_product_attention": ("attn_mask", "is_causal", "scale", "enable_gqa"),
    "torch.mm": ("out_dtype",),
    "torch.distributed.init_process_group": ("backend", "timeout"),
    "torch.distributed.new_group": ("ranks", "timeout", "backend", "use_local_synchronization"),
    "torch.optim.AdamW": ("lr", "betas", "eps", "weight_decay", "fused"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "torch.nn.attention.varlen.varlen_attn": ("scale", "window_size", "enable_gqa"),
}
OPERATORS = ("_log_softmax.out", "_softmax.out", "silu.out", "silu_backward.grad_input")


def check(setting: Setting) -> Outcome:
    faults = []
    figures: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{name: _version(name) for name in LIBRARIES},
        **_device(setting.device),
    }
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        faults.append(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    for name, arguments in {**ARGUMENTS, **OPTIONAL}.items():
        missing = missing_arguments(name, arguments)
        figures[f"missing arguments of {name}"] = missing
        if missing and name in ARGUMENTS:
            faults.append(f"{name} does not take {', '.join(missing)}")
    for name in OPERATORS:
        operator, overload = name.split(".")
        if not hasattr(getattr(torch.ops.aten, operator, None), overload):
            faults.append(f"torch has no operator aten::{name}")
    if setting.device == "cuda" and not torch.distributed.is_nccl_available():
        faults.append("torch is built without NCCL, by which several GPUs communicate")
    product = torch.ones(8, 8, device=setting.device) @ torch.ones(8, 8, device=setting.device)
    if not bool((product == 8).all()):
        faults.append(f"a product of ones on {setting.device} is wrong")
    return Outcome(figures, faults)


def missing_arguments(name: str, arguments: tuple[str, ...]) -> list[str]:
    """Those that a function of torch, by its dotted name, does not take; all, where there is none."""
    function = _find(name)
    if function is None:
        return list(arguments)
    try:
        taken = inspect.signature(function).parameters
        return [argument for argument in arguments if argument not in taken]
    except ValueError:  # a built-in function, which tells its arguments in the first lines of its documentation only
        text = inspect.getdoc(function) or ""
        return [argument for argument in arguments if argument not in text]


def _find(name: str) -> Callable[..., Any] | None:
    import torch.nn.attention.varlen

    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "cpu", "multiplies bf16": platform.multiplies_bf16()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory, GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "multiplies bf16": platform.multiplies_bf16(),
        "peak bf16 TFLOP/s by the data sheet (0: not known)": platform.peak_flops(torch.bfloat16) / 1e12,
    }
