"""NVIDIA GPUs of this machine that torch does not see: who means to train on the CPU beside them says so."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import torch

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel import environment

_SECONDS = 30.0  # that nvidia-smi may take
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_gpus() -> None:
    """Raise UserError where this machine has GPUs, torch finds none, and the user has not hidden them; also where it
    finds fewer than this rank's number."""
    if torch.cuda.is_available():
        check_number(environment.number("LOCAL_RANK", 0), torch.cuda.device_count())
        return
    if _are_hidden():
        return
    present = gpus()
    if present:
        found = f"{len(present)} NVIDIA GPU{'s' * (len(present) != 1)} ({present[0]}{' …' * (len(present) > 1)})"
        on_purpose = f"set {_VISIBLE}= (empty) to run on the CPU"
        raise UserError(f"this machine has {found}, but {_why_not_found()}; or {on_purpose}")


def check_number(local_rank: int, num_gpus: int) -> None:
    """Raise UserError where a machine's rank has no GPU of its own. num_gpus: that torch sees."""
    if local_rank >= num_gpus:
        seen = f"torch sees {num_gpus} there{_as_named(' (', ')')}"
        raise UserError(
            f"rank {local_rank} of {socket.gethostname()} has no GPU: {seen}; "
            "start as many ranks as it sees (RANKS_PER_NODE, --nproc-per-node); of MIG instances, it sees one"
        )


def gpus(devices: Path = Path("/dev")) -> list[str]:
    """What names each GPU of this machine: its device file, else the line of nvidia-smi. MIG instances do not count."""
    files = sorted(str(path) for path in devices.glob("nvidia[0-9]*"))
    if files or not shutil.which("nvidia-smi"):
        return files
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.partition(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU ")]


def _are_hidden() -> bool:
    """Whether the user has said that no GPU is to be used."""
    value = os.environ.get(_VISIBLE)
    return value is not None and value.strip() in ("", "-1")


def _why_not_found() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it (https://pytorch.org/get-started)"
    try:
        torch.cuda.init()
        reason = "no CUDA device is available"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    found = f"finds none ({reason}{_as_named(', ')})"
    return f"torch {torch.__version__} {found}: mend the driver (nvidia-smi shows it)"


def _as_named(before: str, after: str = "") -> str:
    """What CUDA_VISIBLE_DEVICES says, if anything."""
    visible = os.environ.get(_VISIBLE)
    return "" if visible is None else f"{before}{_VISIBLE}={visible}{after}"
