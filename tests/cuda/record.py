"""What a pretended device was asked for, by the line that asked."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_OWN = os.path.dirname(__file__)
_ROOT = os.path.dirname(os.path.dirname(_OWN))
_PACKAGE = "megatron_mdm"
_PASSED_OVER = ("/torch/", "contextlib", "typing_extensions")  # libraries whose lines say nothing

_local = threading.local()
synchronisations: Counter[str] = Counter()  # calls in which the host waits for the device
unpinned_copies: Counter[str] = Counter()  # to the device, from memory that the device cannot read by itself


def synchronised(kind: str) -> None:
    synchronisations[f"{kind}: {call_site()}"] += 1


def reset() -> None:
    synchronisations.clear()
    unpinned_copies.clear()


def is_in_collective() -> bool:
    """Whether this thread waits for a collective: gloo then copies from its buffers, as NCCL does not."""
    return getattr(_local, "in_collective", False)


@contextmanager
def collective() -> Iterator[None]:
    before = is_in_collective()
    _local.in_collective = True
    try:
        yield
    finally:
        _local.in_collective = before


def call_site() -> str:
    """The innermost line outside torch and this folder and, where that is another library's, ours that led to it."""
    frame = sys._getframe(1)
    innermost = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OWN) and not any(name in file for name in _PASSED_OVER):
            line = f"{_short(file)}:{frame.f_lineno}"
            innermost = innermost or line
            if f"/{_PACKAGE}/" in file:
                return line if line == innermost else f"{innermost} < {line}"
        frame = frame.f_back
    return innermost or "?"


def _short(file: str) -> str:
    """A library's file by its place among the libraries, ours by its place in the repository."""
    return file.split("/site-packages/")[-1].removeprefix(f"{_ROOT}/")
