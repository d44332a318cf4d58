"""What a launcher tells a rank: by signals, and by variables of the environment, which are read, checked, and named
where something is amiss.

A variable that is empty counts as one that is not set. Only the standard library is needed.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from megatron_mdm.config.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a preemption; what Slurm can be asked to send before the time limit
LAUNCH_ID = "MDM_LAUNCH_ID"  # the same for every try of one launch; the launch scripts set it
_SECONDS_TO_RESOLVE = 15.0  # a name that is new may take so long to be known everywhere
_SECONDS_TO_ANSWER = 10.0  # that one look-up may take beyond
_SECONDS_TO_CONNECT = 3.0
_OF_A_RANK = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside RANK
_PORTS = 2**16


def variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def number(name: str, default: int) -> int:
    """Raises UserError where it is none, or below 0."""
    text = variable(name)
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"the variable {name} is '{text}', not a number; unset it, or start with launch/torchrun.py")
    return int(text)


def is_rank() -> bool:
    """Whether a launcher has started this process as one of a job."""
    return bool(variable("RANK"))


def check_rank() -> None:
    """Raise UserError where a launcher's variables are not whole, or its rank 0 has a name that leads nowhere."""
    if not is_rank():
        return
    missing = [name for name in _OF_A_RANK if not variable(name)]
    if missing:
        raise UserError(f"RANK is set, but {' and '.join(missing)} not; start with launch/torchrun.py, or set all")
    rank = number("RANK", 0)
    size = number("WORLD_SIZE", 1)
    port = number("MASTER_PORT", 0)
    if rank >= size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE {size}: ranks are counted from 0")
    if not 0 < port < _PORTS:
        raise UserError(f"MASTER_PORT is {port}; a port is between 1 and {_PORTS - 1}")
    check_host(variable("MASTER_ADDR"))


def check_alone() -> None:
    """Raise UserError where a process that no launcher has started is to be one of several."""
    if number("WORLD_SIZE", 1) > 1:
        raise UserError(f"WORLD_SIZE is {variable('WORLD_SIZE')}, but RANK is not set; start with launch/torchrun.py")


def check_host(host: str) -> None:
    """Raise UserError, within half a minute, where the name in MASTER_ADDR has no address."""
    reasons: list[str] = []
    look_up = threading.Thread(target=_look_up, args=(host, reasons), daemon=True)
    look_up.start()
    look_up.join(_SECONDS_TO_RESOLVE + _SECONDS_TO_ANSWER)
    if look_up.is_alive():
        reasons.append("the name service does not answer")
    if reasons:
        raise UserError(
            f"MASTER_ADDR is '{host}', which has no address on {socket.gethostname()} ({reasons[-1]}); set it to the "
            "name or address of rank 0's node, as every node knows it"
        )


def describe_master(host: str, port: int) -> str:
    """Whether anything answers there."""
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    try:
        socket.create_connection((host, port), _SECONDS_TO_CONNECT).close()
    except OSError as error:
        return f"nothing answers at {where}: {error.strerror or error}"
    return f"somebody answers at {where}"


def taken_port(message: str, port: int) -> str:
    """The line for an error of a server of torch's that could not have its port; empty for other errors."""
    if "EADDRINUSE" not in message:
        return ""
    return f"port {port} is taken on {socket.gethostname()}; set MASTER_PORT to a free one"


def _look_up(host: str, reasons: list[str]) -> None:
    """Leave the last reason, where there is no address in the time."""
    deadline = time.monotonic() + _SECONDS_TO_RESOLVE
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                reasons.append(getattr(error, "strerror", None) or str(error))
                return
            time.sleep(0.5)
