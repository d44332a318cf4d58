"""Process groups of a pretended CUDA job: gloo's, of which those that would be NCCL's refuse tensors of the host."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_mdm.parallel.single_rank import SINGLE
from tests.cuda import memory, record

# Names of groups; one of a single rank (parallel/single_rank.py) is in none and takes every tensor.
_nccl: set[str] = set()
_gloo: set[str] = set()


def install() -> None:
    """Replace the functions that make groups. No group may exist yet."""
    make_default = distributed_c10d.init_process_group
    make_group = distributed_c10d.new_group
    signature = inspect.signature(make_group)

    def init_process_group(backend: str | None = None, *arguments: Any, **named: Any) -> None:
        named.pop("device_id", None)
        if backend == SINGLE:
            make_default(SINGLE, *arguments, **named)
            return
        make_default("gloo", *arguments, **named)
        (_gloo if backend == "gloo" else _nccl).add(distributed_c10d._get_default_group().group_name)

    def new_group(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        backend = bound.arguments["backend"]
        if backend == SINGLE:
            return make_group(*arguments, **named)
        is_nccl = backend == "nccl" or (backend is None and _is_nccl(None))
        bound.arguments.update(backend="gloo", pg_options=None, device_id=None)
        group = make_group(*bound.args, **bound.kwargs)
        if isinstance(group, dist.ProcessGroup):
            (_nccl if is_nccl else _gloo).add(group.group_name)
        return group

    for module in (dist, distributed_c10d):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]
        module.new_group = new_group  # type: ignore[attr-defined]
    wait = dist.Work.wait

    def wait_for_collective(self: dist.Work, *arguments: Any) -> Any:
        with record.collective():
            return wait(self, *arguments)

    dist.Work.wait = wait_for_collective  # type: ignore[method-assign]
    distributed_c10d._get_object_coll_device = lambda group=None: "cuda" if _is_nccl(group) else "cpu"


def check_collective(name: str, arguments: Any, tensors: list[torch.Tensor]) -> None:
    """Raise what the group of a c10d operation would."""
    if name == "barrier":
        return
    group = _group_name(arguments)
    if group in _gloo and any(memory.is_on_device(tensor) for tensor in tensors):
        raise RuntimeError(f"{name} of a gloo group was given a tensor of the device [{record.call_site()}]")
    for tensor in tensors if group in _nccl else ():
        if tensor.numel() and not memory.is_on_device(tensor):
            raise RuntimeError(
                f"No backend type associated with device type cpu: {name}, {tuple(tensor.shape)} [{record.call_site()}]"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"Tensors must be contiguous: {name} [{record.call_site()}]")


def _is_nccl(group: dist.ProcessGroup | None) -> bool:
    return (group or distributed_c10d._get_default_group()).group_name in _nccl


def _group_name(arguments: Any) -> str:
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return str(dist.ProcessGroup.unbox(argument).group_name)
            except (RuntimeError, TypeError):  # a reduction's name
                continue
    return ""
