"""Watching what is on the disk when it gets its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Disk:
    """Watches what is synchronised and what gets its name; files are written as ever."""

    def __init__(self) -> None:
        self.synced: dict[int, int] = {}  # size by inode
        self.named: list[str] = []
        self.too_early: list[str] = []
        self._fsync = os.fsync
        self._rename = os.rename
        self._replace = os.replace

    def __enter__(self) -> Disk:
        os.fsync = self.fsync
        os.rename = self.rename
        os.replace = self.replace
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync = self._fsync
        os.rename = self._rename
        os.replace = self._replace

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = status.st_size

    def rename(self, source: Any, target: Any, **arguments: Any) -> None:
        self._look(Path(source), str(target))
        self._rename(source, target, **arguments)

    def replace(self, source: Any, target: Any, **arguments: Any) -> None:
        self._look(Path(source), str(target))
        self._replace(source, target, **arguments)

    def _look(self, source: Path, target: str) -> None:
        self.named.append(target)
        for path in [source, *source.rglob("*")]:
            status = path.stat()
            known = self.synced.get(status.st_ino)
            if known is None or (path.is_file() and known != status.st_size):
                self.too_early.append(f"{path} → {target}")
