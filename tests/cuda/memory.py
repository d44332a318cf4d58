"""Which memory is the pretended device's. All of it is the host's; each storage is known by its address."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

HOST = torch.device("cpu")
DEVICE = torch.device("cuda", 0)
REAL_DEVICE = torch._C.TensorBase.device  # the property, before it is replaced

_on_device: dict[int, bool] = {}  # by a storage's address
_pinned: set[int] = set()
_local = threading.local()


def address(tensor: torch.Tensor) -> int:
    """Of a tensor's storage; 0 where it has none."""
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # a meta tensor, or one that wraps others
        return 0


def is_meta(tensor: torch.Tensor) -> bool:
    return REAL_DEVICE.__get__(tensor).type != "cpu"


def is_on_device(tensor: torch.Tensor) -> bool:
    return not is_meta(tensor) and _on_device.get(address(tensor), False)


def place(tensor: torch.Tensor, on_device: bool) -> None:
    """Say whose a tensor's storage is."""
    with torch._C.DisableTorchFunction():
        where = address(tensor)
    if where:
        _on_device[where] = on_device
        _pinned.discard(where)


def pin(tensor: torch.Tensor) -> None:
    _pinned.add(address(tensor))


def is_pinned(tensor: torch.Tensor) -> bool:
    return address(tensor) in _pinned and not is_on_device(tensor)


@contextmanager
def new_storages_on(on_device: bool) -> Iterator[None]:
    """Inside, an operation's new storages are the device's or the host's, whatever its inputs'."""
    before = wanted()
    _local.wanted = on_device
    try:
        yield
    finally:
        _local.wanted = before


def wanted() -> bool | None:
    """What new_storages_on says for this thread; None: nothing."""
    return getattr(_local, "wanted", None)


def as_device(value: Any) -> torch.device | None:
    """A device argument, which may be a number of a CUDA device or a name."""
    if value is None:
        return None
    return DEVICE if isinstance(value, int) or torch.device(value).type == "cuda" else torch.device(value)
