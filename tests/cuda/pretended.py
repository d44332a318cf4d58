"""A CUDA device pretended on the CPU, in the process that calls install(): see README.md for what it shows."""

from __future__ import annotations

import os
import threading

from tests.cuda import groups, kernels, runtime, tensors
from tests.cuda.operations import PretendedDevice


def install() -> None:
    """Before the process joins a job or makes a tensor. There is no way back: a rank is forked for it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    runtime.install()
    groups.install()
    kernels.install()
    tensors.install()
    _choose_accelerator()
    PretendedDevice().__enter__()
    _in_every_thread()


def _choose_accelerator() -> None:
    """DeepSpeed chose the CPU when the server of ranks imported it; it asks anew at every use."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    os.environ["DS_ACCELERATOR"] = "cuda"
    set_accelerator(CUDA_Accelerator())


def _in_every_thread() -> None:
    """A dispatch mode is its thread's own."""
    run = threading.Thread.run

    def run_with_device(self: threading.Thread) -> None:
        with PretendedDevice():
            run(self)

    threading.Thread.run = run_with_device  # type: ignore[method-assign]
