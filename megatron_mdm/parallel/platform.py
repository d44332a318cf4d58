"""CPU or CUDA: every difference between the two lives here.

The CUDA branches have run on one GPU (tools/README.md says which); NCCL between several has not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
import warnings
from typing import Any

import torch

from megatron_mdm.parallel import environment
from megatron_mdm.parallel.defaults import set_defaults
from megatron_mdm.parallel.peaks import peak_of


def quiet_libraries() -> None:
    """Keep imports of DeepSpeed and megatron-core from printing notices that no user can act on, and oneDNN from
    keeping memory.

    Call before importing them. DEEPSPEED_LOG_LEVEL=info brings DeepSpeed's own log back.
    """
    set_defaults()
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # oneDNN keeps the last 1,024 shapes' bf16 products with their buffers: gigabytes, where lengths vary.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes of its starts and stops
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch\.distributed|torch\.autograd)")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def is_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's model lives."""
    if is_cuda():
        return torch.device("cuda", environment.number("LOCAL_RANK", 0))
    return torch.device("cpu")


def communication_backend() -> str:
    return "nccl" if is_cuda() else "gloo"


def prepare() -> None:
    """Select this rank's device; on CPU, let megatron-core's hard-coded CUDA calls find the CPU."""
    select_device()
    if not is_cuda():
        # megatron-core allocates its communication buffers on torch.cuda.current_device().
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        # DeepSpeed would compile a shared-memory all-reduce, which only its inference calls, at the first start.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def select_device() -> None:
    """Make this rank's device that of the calling thread; a new thread has the host's first."""
    if is_cuda():
        torch.cuda.set_device(device())


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


def peak_memory_bytes() -> int:
    """The most that this rank has held at a time: on CUDA in tensors, on CPU as resident memory of the process."""
    if is_cuda():
        return torch.cuda.max_memory_allocated(device())
    with open("/proc/self/status", encoding="ascii") as file:  # getrusage's maximum starts from the parent's
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


_GEMM_SHAPE = (512, 512, 1024)
_GEMM_REPEATS = 5


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s that this rank could reach at most: on CUDA by the device's data sheet (0: not known), on CPU the best of
    a few matrix products. Ranks that share a machine measure at the same time."""
    if is_cuda():
        peak = peak_of(torch.cuda.get_device_name(device()))
        if dtype != torch.float32:
            return peak.half * 1e12
        is_rounded = torch.get_float32_matmul_precision() != "highest"  # to TF32
        return (peak.tf32 if is_rounded else peak.fp32) * 1e12
    rows, inner, columns = _GEMM_SHAPE
    left = torch.ones(rows, inner, dtype=dtype)
    right = torch.ones(inner, columns, dtype=dtype)
    best = math.inf
    for _ in range(1 + _GEMM_REPEATS):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * inner * columns / best


def memory_bytes() -> int:
    """Memory a rank may fill: the device's on CUDA; on CPU its share of what is available now."""
    if is_cuda():
        return torch.cuda.mem_get_info(device())[1]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // ranks_on_host()


def host() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()


def ranks_on_host() -> int:
    return environment.number("LOCAL_WORLD_SIZE", environment.number("WORLD_SIZE", 1))


def device_name() -> str:
    """The GPU's model; CPUs of one job may be of several."""
    return torch.cuda.get_device_name(device()) if is_cuda() else "cpu"


def describe() -> str:
    """The device of this rank and the library that connects it with others, for the first line of a log."""
    if not is_cuda():
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' * (threads != 1)} a rank; torch {torch.__version__}, gloo"
    index = device().index
    memory = memory_bytes() / 2**30
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    return f"cuda:{index} {device_name()}, {memory:.0f} GiB; {built}, NCCL"


def synchronize() -> None:
    """Wait until this rank's device has done what it was given."""
    if is_cuda():
        torch.cuda.synchronize()


def flight_record() -> dict[str, Any]:
    """The last collectives of this process as torch's flight recorder keeps them, "retired" where they are over. Empty
    where it is off or torch has none."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace_json" if is_cuda() else "_dump_fr_trace_json", None)
    return json.loads(dump()) if dump else {}
