"""CPU or CUDA: every difference between the two lives here.

The CUDA branches are written against the installed libraries and have not been run by the authors.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch


def quiet_libraries() -> None:
    """Keep imports of DeepSpeed and megatron-core from printing notices that no user can act on, and oneDNN from
    keeping memory.

    Call before importing them. DEEPSPEED_LOG_LEVEL=info brings DeepSpeed's own log back.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # oneDNN keeps the last 1,024 shapes' bf16 products with their buffers: gigabytes, where lengths vary.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch\.distributed|torch\.autograd)")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def is_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's model lives."""
    if is_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def communication_backend() -> str:
    return "nccl" if is_cuda() else "gloo"


def prepare() -> None:
    """Select this rank's device; on CPU, let megatron-core's hard-coded CUDA calls find the CPU."""
    if is_cuda():
        torch.cuda.set_device(device())
    else:
        # megatron-core allocates its communication buffers on torch.cuda.current_device().
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        # DeepSpeed would compile a shared-memory all-reduce, which only its inference calls, at the first start.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def multiplies_bf16() -> bool:
    """Whether bf16 matrix products are native here, and so faster than fp32."""
    if is_cuda():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split(":", 1)[1].split() for line in file if line.startswith("flags")), [])
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def memory_bytes() -> int:
    """Memory a rank may fill: the device's on CUDA; on CPU its share of what is available now."""
    if is_cuda():
        return torch.cuda.mem_get_info(device())[1]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
