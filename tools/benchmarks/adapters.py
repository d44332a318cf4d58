"""A step of low-rank adapters against one that trains every parameter: time, and peak memory of a process each."""

from __future__ import annotations

from dataclasses import replace

from megatron_mdm.parallel import platform
from tools.benchmarks.cases import Case

RANK = 16
TIME_TARGET = 0.8  # no gradients of the matrices are computed: two products of three
MEMORY_TARGET = 0.5  # without the libraries'


def adapter_cases() -> list[tuple[Case, Case]]:
    """(every parameter, adapters): configs/pretrain/125m.yaml's 12 layers on samples of GSM8K's lengths."""
    dtypes = ("fp32", "bf16") if platform.multiplies_bf16() else ("fp32",)
    full = [
        Case(
            f"gsm8k-12-layers-{dtype}",
            8192,
            dtype,
            "gsm8k",
            4,
            2,  # samples at a time: what memory is short of is weights and moments, not activations
            num_layers=12,
            hidden_size=768,
            ffn_hidden_size=2048,
            num_heads=12,
            mode="packed",
        )
        for dtype in dtypes
    ]
    return [(case, replace(case, name=f"lora-{case.name}", lora_rank=RANK)) for case in full]
