"""Fifty lengths that torch has not seen, with cuDNN's attention allowed and not: it plans for each new shape.

The layers do without it (models/spec.py), since the lengths of micro-batches vary; this says what that costs or saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mdm.models.attention import fused
from tools.gpu_check.attention_inputs import Heads, with_gradients
from tools.gpu_check.measure import timed
from tools.gpu_check.outcome import Outcome, Setting, skipped

LENGTHS = range(515, 515 + 50 * 29, 29)
ROWS = 4
HEADS = Heads(16, 16, 64)


def check(setting: Setting) -> Outcome:
    if setting.device == "cpu":
        return skipped("cuDNN is for CUDA devices")
    seconds: dict[str, dict[str, float]] = {}
    with_gradients(_attend, _inputs(LENGTHS[0] - 1))  # what the first call of all costs is not the question
    for name, allowed in (("without cuDNN", False), ("with cuDNN", True)):
        with cudnn_attention(allowed):
            new, again = (sum(_seconds(length) for length in LENGTHS) for _ in range(2))
        seconds[name] = {"new lengths, s": new, "the same again, s": again}
    without, allowed_too = seconds["without cuDNN"]["new lengths, s"], seconds["with cuDNN"]["new lengths, s"]
    faults = []
    if without > 1.1 * allowed_too:
        faults.append(
            f"cuDNN's attention is faster even where every length is new ({allowed_too:.2f} against {without:.2f} s): "
            "models/spec.py should allow it"
        )
    return Outcome(dict(seconds), faults)


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _seconds(length: int) -> float:
    inputs = _inputs(length)
    return timed(lambda: with_gradients(_attend, inputs), "cuda")


def _inputs(length: int) -> list[torch.Tensor]:
    drawn = HEADS.draw(ROWS, length, dtype=torch.bfloat16, device="cuda")
    return [x.detach().transpose(1, 2).requires_grad_() for x in drawn]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return fused(query, key, value, None, None, False)
