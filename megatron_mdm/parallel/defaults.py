"""Variables that torch, NCCL and CUDA read when they are loaded: the defaults of every rank, whatever has started it.

Only the standard library is needed: set_defaults comes before anything imports torch. Launchers pass on few variables
(DeepSpeed's, to other nodes: NCCL's, paths and PYTHONPATH), so every rank sets them for itself.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

DEFAULTS = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a rank whose peer is gone ends
    "TORCH_FR_BUFFER_SIZE": "2000",  # the last collectives of each rank …
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # … are written where one hangs
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core's order of kernels
}
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_ALLOCATOR_BEFORE = "PYTORCH_CUDA_ALLOC_CONF"  # its name before torch 2.9, which torch still reads
_SEGMENTS = "expandable_segments:True"  # lengths vary from batch to batch
_INTERFACE = "INTERFACE"  # the network between the nodes, as `ip link` names it; without it, the libraries guess
_OF_THE_INTERFACE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def set_defaults(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set, or empty. What the user has set wins."""
    for name, value in DEFAULTS.items():
        _set(variables, name, value)
    if not variables.get(_ALLOCATOR_BEFORE):
        _set(variables, _ALLOCATOR, _SEGMENTS)
    if variables.get("RANK"):  # ranks on one machine must not fight for its cores
        _set(variables, "OMP_NUM_THREADS", "1")
    interface = variables.get(_INTERFACE)
    for name in _OF_THE_INTERFACE if interface else ():
        _set(variables, name, str(interface))


def _set(variables: MutableMapping[str, str], name: str, value: str) -> None:
    if not variables.get(name):
        variables[name] = value
