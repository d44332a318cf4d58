"""The checks by name, in the order in which they run. Each is the function check(Setting) -> Outcome of its module."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from tools.gpu_check.outcome import Outcome, Setting


class Check(NamedTuple):
    seconds: float  # after which its process is killed; all together stay below the time for the whole
    what: str


CHECKS = {  # the module of that name beside this file
    "versions": Check(20, "versions of the libraries, and the signatures that the code calls them by"),
    "varlen": Check(60, "packed attention against a loop over the segments, forward and backward"),
    "padded": Check(45, "attention under padding masks, by torch's back end"),
    "shapes": Check(55, "fifty new lengths with cuDNN's attention on and off"),
    "head": Check(25, "cross-entropy by the rows of a chunk: time, memory, error"),
    "quickstart": Check(65, "twenty steps of the quickstart's model against the same on the CPU"),
    "layouts": Check(60, "ZeRO 0 to 3 and offload: the same losses and gradient norms"),
    "resume": Check(40, "a run that was saved and restored equals the one that was not, bit for bit"),
    "trace": Check(45, "a step of the 125M configuration: gaps between kernels, synchronisations"),
    "watchdog": Check(40, "a kernel that never ends is ended by the watchdog"),
    "speed": Check(75, "125M and 1B at 4,096 tokens: MFU, memory against the plan, what the methods cost"),
    "compiled": Check(60, "the 125M configuration with compiled blocks: the same loss, and what it gains"),
}


def run_here(name: str, setting: Setting) -> Outcome:
    """A check in this process."""
    outcome: Outcome = importlib.import_module(f"tools.gpu_check.{name}").check(setting)
    return outcome
