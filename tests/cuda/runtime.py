"""torch.cuda's functions for a pretended device: its properties, streams and events."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

from tests.cuda import memory, record

NAME = "NVIDIA H100 80GB HBM3"
_BYTES = 80 << 30
_PROPERTIES = SimpleNamespace(
    name=NAME,
    total_memory=_BYTES,
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    uuid="pretended",
    gcnArchName="",
)


class Stream:
    """All work is done when it is given: there is nothing to wait for, but waiting is counted."""

    cuda_stream = 0
    device = memory.DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        record.synchronised("stream.synchronize")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _: Any = None) -> None:
        pass

    def wait(self, _: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        record.synchronised("event.synchronize")

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def install() -> None:
    stream = Stream()
    nothing = SimpleNamespace(
        range_push=_nothing, range_pop=_nothing, mark=_nothing, range=lambda *_, **__: contextlib.nullcontext()
    )
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": _nothing,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: _PROPERTIES,
        "mem_get_info": lambda *_: (_BYTES, _BYTES),
        "memory_stats": lambda *_: {},
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "synchronize": lambda *_: record.synchronised("cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "nvtx": nothing,
    }
    for counted in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replaced[counted] = lambda *_: 1 << 20
    for without_effect in (
        "reset_peak_memory_stats",
        "empty_cache",
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
        "ipc_collect",
        "_lazy_call",
    ):
        replaced[without_effect] = _nothing
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    pass
