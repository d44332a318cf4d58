"""Every operation on tensors, looked at before it runs: devices do not mix, waits for the device are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.cuda import memory, record
from tests.cuda.groups import check_collective
from tests.cuda.kernels import PLAIN

# which take tensors of both devices
_MIXING = {"copy_", "_to_copy", "to", "lift_fresh", "detach", "alias", "set_", "resize_", "_local_scalar_dense"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
# whose result's shape or value the host must know
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "bincount",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}
_LIKE = {
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty_strided",
}


class PretendedDevice(TorchDispatchMode):
    """Active in each thread that works on tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[-1]
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        if function.namespace == "c10d":
            check_collective(name, args, tensors)
        else:
            _check_devices(function, name, tensors)
            _count(name, tensors, args, kwargs)
        made_on_device = any(memory.as_device(v).type == "cuda" for v in kwargs.values() if _is_device(v))
        if made_on_device:
            kwargs = {key: memory.HOST if _is_device(value) else value for key, value in kwargs.items()}
        before = {memory.address(tensor) for tensor in tensors}
        on_device = _result_on_device(name, tensors, made_on_device)
        result = PLAIN.get(function, function)(*args, **kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and (memory.address(value) not in before or name == "lift_fresh"):
                memory.place(value, on_device)
        return result


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device)


def _result_on_device(name: str, tensors: list[torch.Tensor], made_on_device: bool) -> bool:
    wanted = memory.wanted()
    if made_on_device:
        return True
    if wanted is not None and (not tensors or name in _LIKE or name in ("_to_copy", "lift_fresh", "clone")):
        return wanted
    return any(memory.is_on_device(tensor) for tensor in tensors)


def _is_of_host(tensor: torch.Tensor) -> bool:
    """With values that a kernel of the device would have to read; single numbers travel with its arguments."""
    return bool(
        tensor.dim() and tensor.numel() and not memory.is_meta(tensor) and memory.address(tensor)
    ) and not memory.is_on_device(tensor)


def _check_devices(function: Any, name: str, tensors: list[torch.Tensor]) -> None:
    if name in _MIXING or not tensors:
        return
    on_device = [memory.is_on_device(tensor) and bool(tensor.dim()) for tensor in tensors]
    if name in _INDEXING:
        if not memory.is_on_device(tensors[0]) and any(on_device[1:]):
            raise RuntimeError(f"a tensor of the host is indexed by one of the device [{record.call_site()}]")
        return
    shapes = [tuple(tensor.shape) for tensor in tensors if _is_of_host(tensor)]
    if any(on_device) and shapes:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {function} has tensors of the "
            f"host of shapes {shapes} [{record.call_site()}]"
        )


def _count(name: str, tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> None:
    if name == "copy_" and len(tensors) == 2:
        _count_copy(tensors[0], tensors[1], kwargs.get("non_blocking", len(args) > 2 and bool(args[2])))
        return
    if not any(memory.is_on_device(tensor) for tensor in tensors):
        return
    if name in _WAITING or (name == "repeat_interleave" and len(tensors) > 1):
        record.synchronised(name.strip("_"))
    elif name in _INDEXING and memory.is_on_device(tensors[0]) and not _fills(name, tensors):
        for index in tensors[1:]:
            if index.dtype in (torch.bool, torch.uint8) and memory.is_on_device(index):
                record.synchronised("index by a mask")
            elif _is_of_host(index):
                record.synchronised("index of the host")


def _fills(name: str, tensors: list[torch.Tensor]) -> bool:
    """x[mask] = number, which torch fills in without looking for the places. The number is a tensor by now, so that one
    of the device passes for it."""
    return name != "index" and not tensors[-1].dim()


def _count_copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    count_copy(source, memory.is_on_device(to), non_blocking, pinned=memory.is_pinned(to))


def count_copy(source: torch.Tensor, to_device: bool, non_blocking: bool, pinned: bool) -> None:
    """A copy between host and device. pinned: the memory of the host that it goes to. As in torch's copy kernel
    (aten/src/ATen/native/cuda/Copy.cu), one that may block waits for its end, also where it goes to the device."""
    if memory.is_on_device(source) == to_device or not source.numel() or record.is_in_collective():
        return
    if to_device:
        if not non_blocking:
            record.synchronised("blocking copy to the device")
        elif not memory.is_pinned(source):
            record.unpinned_copies[record.call_site()] += 1
    elif not (non_blocking and pinned):
        record.synchronised("copy to the host")
