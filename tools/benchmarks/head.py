"""Benchmark of the head alone: fused, chunked cross-entropy against plain full logits, forward and backward."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_mdm.models.cross_entropy import weighted_cross_entropy
from tools.benchmarks.measure import compare, interleaved, peak_memory, report_memory, resident_mib

ROWS = 2048
HIDDEN = 512
VOCAB = 126_464
TIME_TARGET = 1.1
MEMORY_TARGET = 0.15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def head_step(of: str, dtype: str) -> Callable[[int], None]:
    """One forward and backward pass of `ours` or `plain`; gradients of head and rows are kept, as in training."""
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.02).to(DTYPES[dtype]).requires_grad_()
    rows = torch.randn(ROWS, HIDDEN, generator=generator).to(DTYPES[dtype]).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    head.grad = torch.zeros_like(head)
    rows.grad = torch.zeros_like(rows)

    def ours(_: int) -> None:
        weighted_cross_entropy(rows, head, labels, weights, VOCAB).total.backward()

    def plain(_: int) -> None:
        cross_entropy = F.cross_entropy((rows @ head.t()).float(), labels, reduction="none")
        (cross_entropy * weights).sum().backward()

    return {"ours": ours, "plain": plain}[of]


def head_suite(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time, and peak memory beyond the head's weight and its gradient."""
    for dtype in ("fp32",) if arguments.quick else ("fp32", "bf16"):
        steps = {of: head_step(of, dtype) for of in ("ours", "plain")}
        seconds = interleaved(steps, arguments.repeats or 5, f"head-{dtype}")
        del steps
        peaks = {of: peak_memory(["--head-memory-of", of, "--head-dtype", dtype]) for of in ("ours", "plain")}
        beyond = [peaks[of]["beyond"] for of in ("ours", "plain")]
        medians = {of: float(np.median(values)) for of, values in seconds.items()}
        yield {
            "description": f"head-{dtype}: {ROWS} rows × {HIDDEN}, vocabulary {VOCAB:,}, forward and backward",
            "seconds": seconds,
            "median_seconds": medians,
            "samples_per_second": {of: ROWS / median for of, median in medians.items()},
            "memory_mib": peaks,
            "ratios": [
                compare("time, ours / plain", seconds["ours"], seconds["plain"], "<=", TIME_TARGET),
                compare(
                    "memory beyond head and gradients, ours / plain", [beyond[0]], [beyond[1]], "<=", MEMORY_TARGET
                ),
            ],
        }


def measure_head_memory(of: str, dtype: str) -> None:
    """In a fresh process: the peak of two passes, less what was resident before them (head, gradients, libraries)."""
    step = head_step(of, dtype)
    before = resident_mib()
    step(0)
    step(1)
    report_memory(before, 0)
