"""Who does a run: processes on any nodes that see the study's folder agree by files that only one can make.

Claims of a run are numbered files. The newest holds it while its process lives: on the same host, that is asked of the
kernel; elsewhere, its file is touched every so often. Where it does not hold any more, whoever makes the next number
has the run: of several that try, one can.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

CLAIMS = "claims"
TOUCH_SECONDS = 20.0
STALE_SECONDS = 300.0  # without a touch, after which a process of another host counts as gone


class Claim:
    """A run that this process does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.touched = time.monotonic()

    def touch(self) -> None:
        """Tell other hosts that the process lives. Call it often; it writes every TOUCH_SECONDS."""
        if time.monotonic() - self.touched >= TOUCH_SECONDS:
            os.utime(self.path)
            self.touched = time.monotonic()

    def give_up(self) -> None:
        """Let another have the run at once, or this process, later."""
        self.path.write_text("{}", encoding="utf-8")
        os.utime(self.path, (0, 0))


def claim(folder: Path, name: str) -> Claim | None:
    """Have a run, or None, where another has it."""
    claims = folder / CLAIMS / name
    claims.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in claims.iterdir() if path.name.isdigit()), default=-1)
    if number >= 0 and holds(claims / str(number)):
        return None
    path = claims / str(number + 1)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(_this_process(), file)
    return Claim(path)


def holds(path: Path) -> bool:
    """Whether the process that made a claim still lives, as far as can be told from here."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8") or "null")
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return True  # it is being written
    if owner is None:  # not yet written; or, after a while, never
        return age < STALE_SECONDS
    if owner.get("host") == socket.gethostname():
        return bool(owner.get("started")) and owner["started"] == _started(owner["pid"])
    return age < STALE_SECONDS


def _this_process() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """What tells a process from a later one of its number: when it began, since which start of the machine; empty
    where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state == "Z" else f"{boot} {fields[18]}"
