"""How far a training step is from the processor's limit: its model FLOPs over what matrix products alone reach, and
where the rest of the time goes, operation by operation.

One process, packed micro-batches, the real step. The peak is the best of square-ish matrix products of the case's type
on the same threads, measured between the steps, so that a processor that others slow down is slower for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_mdm.models.costs import training_flops
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.progress import progress_bar
from megatron_mdm.training.loop import StepResult, Trainer
from tools.benchmarks.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_WARM_UPS = 3
NUM_PROFILED = 3
# (case, least share of the peak)
LIMIT_CASES = (
    (Case("limit-126464-fp32", 126_464, "fp32", "gsm8k", 32, 32, mode="packed"), 0.65),
    (Case("limit-8192-fp32", 8192, "fp32", "gsm8k", 32, 32, mode="packed"), 0.75),
    (
        Case(
            "limit-8192-wide-fp32",
            8192,
            "fp32",
            "gsm8k",
            32,
            32,
            num_layers=8,
            hidden_size=512,
            ffn_hidden_size=1376,
            num_heads=8,
            mode="packed",
        ),
        0.85,
    ),
    (
        Case(
            "limit-quickstart-fp32",
            400,
            "fp32",
            "short",
            32,
            16,
            hidden_size=128,
            ffn_hidden_size=344,
            mode="packed",
        ),
        0.45,
    ),
)
# How the profiler's names of operations begin, by what they are; the first that fits counts.
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "mkldnn_linear"),
    "attention": ("_scaled_dot_product", "_softmax", "_ExplicitAttention"),
    "loss": ("_log_softmax", "exp_", "gather", "scatter_add_", "_WeightedCrossEntropy"),
    "optimizer and norm": ("_fused_adamw_", "linalg_vector_norm", "pow", "sum"),
    "copies": ("copy_", "cat", "clone", "fill_", "zero_", "index"),
    "other kernels": ("",),
}


def limit_of(case: Case, trainer: Trainer, repeats: int) -> dict[str, Any]:
    """Medians over the steps of seconds and of the share of the peak; seconds of a step by kind of operation."""
    dtype = DTYPES[case.dtype]
    seconds: list[float] = []
    shares: list[float] = []
    peaks: list[float] = []
    for number in progress_bar(range(NUM_WARM_UPS + repeats), desc=case.name, unit="step"):
        peak = platform.peak_flops(dtype)
        result = trainer.train_step(number)
        if number >= NUM_WARM_UPS:
            seconds.append(result.seconds)
            peaks.append(peak)
            shares.append(model_flops(trainer, result) / result.seconds)
    best = max(peaks)
    by_kind = profile(lambda: trainer.train_step(repeats + NUM_WARM_UPS))
    return {
        "seconds": seconds,
        "flops_per_second": shares,
        "peaks": peaks,
        "share_of_peak": float(np.median(shares)) / best,
        "share_of_peak_of_its_moment": float(np.median(np.array(shares) / np.array(peaks))),
        "profile_seconds": by_kind,
    }


def model_flops(trainer: Trainer, result: StepResult) -> float:
    """FLOPs of the step's forward and backward passes, padding and recomputation not counted."""
    tokens = result.num_tokens
    length = tokens / len(result.sample_ids)
    return training_flops(trainer.config.model, tokens * result.num_views, length, result.num_selected)


def profile(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a step by kind of operation, and those of the host: Python and what the profiler itself costs."""
    with torch.autograd.profiler.profile() as recorded:
        results = [step() for _ in range(NUM_PROFILED)]
    whole = sum(result.seconds for result in results) / NUM_PROFILED
    kinds = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages():
        seconds = event.self_cpu_time_total / 1e6 / NUM_PROFILED
        kinds[kind_of(event.key)] += seconds
    kinds["host"] = max(0.0, whole - sum(kinds.values()))
    return kinds


def kind_of(operation: str) -> str:
    """Which of KINDS an operation of the profiler's is of."""
    name = operation.removeprefix("aten::")
    return next(kind for kind, begins in KINDS.items() if name.startswith(begins))
