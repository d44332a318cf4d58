"""What tensors say of their device, and how they travel between the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cuda import memory, record
from tests.cuda.operations import count_copy

_BASE = torch._C.TensorBase


def install() -> None:
    properties = {
        "device": lambda self: memory.DEVICE if _is_cuda(self) else memory.REAL_DEVICE.__get__(self),
        "is_cuda": _is_cuda,
        "is_cpu": lambda self: not _is_cuda(self) and not memory.is_meta(self),
    }
    for name, value in properties.items():
        setattr(Tensor, name, property(value))
    methods: dict[str, Any] = {
        "get_device": lambda self: 0 if memory.is_on_device(self) else -1,
        "record_stream": lambda self, _: None,
        "is_pinned": lambda self, *_: memory.is_pinned(self),
        "pin_memory": _pin_memory,
        "to": _to,
        "cuda": lambda self, *_, non_blocking=False: _to(self, memory.DEVICE, non_blocking=non_blocking),
        "cpu": lambda self, *_: _to(self, memory.HOST),
        "numpy": _numpy,
        "tolist": _tolist,
    }
    for name, value in methods.items():
        setattr(Tensor, name, value)
    for name in ("tensor", "as_tensor", "scalar_tensor"):
        setattr(torch, name, _from_values(getattr(torch, name)))
    for name in ("empty", "zeros", "ones", "full", "arange"):
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in ("from_numpy", "frombuffer"):
        setattr(torch, name, _of_host(getattr(torch, name)))


def _is_cuda(self: Tensor) -> bool:
    """An empty tensor has no storage to tell by: ZeRO 3's parameters stay, without their values, where they were."""
    if not isinstance(self, torch.nn.Parameter):
        return memory.is_on_device(self)
    if memory.address(self):
        self.was_on_device = memory.is_on_device(self)
    return getattr(self, "was_on_device", False)


_real_to = _BASE.to
_real_numpy = _BASE.numpy
_real_tolist = _BASE.tolist


def _to(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Tensor.to in all its forms: (device, dtype, non_blocking, copy), (dtype, …), (other, …)."""
    device = memory.as_device(named.pop("device", None))
    other = named.pop("other", None)
    rest = []
    for place, value in enumerate(arguments):
        if isinstance(value, Tensor):
            other = value
        elif isinstance(value, (str, torch.device)) or (place == 0 and type(value) is int):
            device = memory.as_device(value)
        elif not (value is None and place == 0):
            rest.append(value)
    if other is not None:
        device = other.device
        named.setdefault("dtype", other.dtype)
    names = ["dtype", "non_blocking", "copy"]
    if rest and rest[0] is not None and not isinstance(rest[0], torch.dtype):
        names = names[1:]
    named = {key: value for key, value in {**dict(zip(names, rest)), **named}.items() if value is not None}
    if device is not None and device.type == "meta":
        return _real_to(self, device=device, **named)
    is_there = memory.is_on_device(self)
    to_device = is_there if device is None else device.type == "cuda"
    if to_device == is_there:
        return _real_to(self, **named) if named else self
    non_blocking = bool(named.get("non_blocking", False))
    count_copy(self, to_device, non_blocking, pinned=True)  # torch takes pinned memory where it need not block
    named["copy"] = True
    with memory.new_storages_on(to_device):
        result = _real_to(self, **{"dtype": self.dtype, **named})
    memory.place(result, to_device)
    return result


def _pin_memory(self: Tensor, *_: Any) -> Tensor:
    if memory.is_on_device(self):
        raise RuntimeError(f"cannot pin memory of the device [{record.call_site()}]")
    result = self.clone()
    memory.pin(result)
    return result


def _numpy(self: Tensor, *arguments: Any, **named: Any) -> Any:
    if memory.is_on_device(self):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy [{record.call_site()}]")
    return _real_numpy(self, *arguments, **named)


def _tolist(self: Tensor) -> Any:
    if memory.is_on_device(self):
        record.synchronised("tolist")
    return _real_tolist(self)


def _from_values(real: Any) -> Any:
    """torch.tensor and its like: values of the host, copied where a device is named."""

    def make(values: Any, *arguments: Any, device: Any = None, pin_memory: Any = None, **named: Any) -> Tensor:
        result: Tensor = real(values, *arguments, **named)
        if isinstance(values, Tensor):
            return result if device is None else _to(result, device)
        memory.place(result, False)
        if memory.as_device(device) == memory.DEVICE:
            record.synchronised("blocking copy to the device")
            memory.place(result, True)
        return result

    return make


def _factory(real: Any) -> Any:
    def make(*arguments: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        if named.get("device") is not None:
            named["device"] = memory.as_device(named["device"])
        result: Tensor = real(*arguments, **named)
        if pin_memory:
            memory.pin(result)
        return result

    return make


def _of_host(real: Any) -> Any:
    def make(*arguments: Any, **named: Any) -> Tensor:
        result: Tensor = real(*arguments, **named)
        memory.place(result, False)
        return result

    return make
