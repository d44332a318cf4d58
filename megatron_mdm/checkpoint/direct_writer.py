"""Writing large files past the page cache: several times as fast as through it, and nothing in it is displaced."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

PAGE = mmap.PAGESIZE
_BUFFER_BYTES = 16 * 1024 * 1024  # a multiple of every device's block size
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


def write_memory(path: Path, parts: Iterable[memoryview]) -> None:
    """A new file with the bytes of all parts. It is on the disk when this returns. Raises OSError.

    Parts begin at a page, and all but the last are of whole pages; others are written through the page cache.
    """
    descriptor = _open(path)
    try:
        for data in parts:
            _write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DirectWriter:
    """A new file, written in pieces."""

    def __init__(self, path: Path) -> None:
        self.descriptor = _open(path)
        self.buffer = mmap.mmap(-1, _BUFFER_BYTES)  # direct writes need memory that begins at a page
        self.filled = 0

    def write(self, data: memoryview) -> None:
        while data:
            part = data[: _BUFFER_BYTES - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            data = data[len(part) :]
            if self.filled == _BUFFER_BYTES:
                self._flush()

    def finish(self) -> None:
        """Write the rest, which need not be whole blocks, and wait until everything is on the disk."""
        _through_the_cache(self.descriptor)
        self._flush()
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)

    def _flush(self) -> None:
        with memoryview(self.buffer) as whole:
            start = 0
            while start < self.filled:
                start += os.write(self.descriptor, whole[start : self.filled])
                if start % PAGE:  # the disk took a part that ends inside a block
                    _through_the_cache(self.descriptor)
        self.filled = 0


def _write(descriptor: int, data: memoryview) -> None:
    start = 0
    while start < len(data):
        part = data[start : start + _BUFFER_BYTES]
        if start % PAGE or len(part) % PAGE:  # the last part, or what the disk has cut inside a block
            _through_the_cache(descriptor)
        try:
            start += os.write(descriptor, part)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(descriptor):
                raise
            _through_the_cache(descriptor)  # the memory does not begin where the disk wants it


def _open(path: Path) -> int:
    """Open a new file for direct writes, or, where the file system takes none, for writes through the cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError:  # not there, or only not directly: the second attempt tells
        return os.open(path, flags, 0o644)


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _through_the_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
