"""FLOP/s of NVIDIA's GPUs in matrix products, by the names that CUDA gives them."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense matrix products, 10¹² FLOP/s."""

    half: float  # bf16 and fp16, summed in fp32
    tf32: float
    fp32: float


# As NVIDIA's data sheets give them, without sparsity. Of several that fit, the one of most words holds.
PEAKS = {
    "V100": Peak(125, 15.7, 15.7),  # fp16; it has neither bf16 nor TF32
    "V100 PCIE": Peak(112, 14, 14),
    "A100": Peak(312, 156, 19.5),
    "A800": Peak(312, 156, 19.5),
    "A40": Peak(149.7, 74.8, 37.4),
    "A10": Peak(125, 62.5, 31.2),
    "L4": Peak(121, 60, 30.3),
    "L40": Peak(181, 90.5, 90.5),
    "L40S": Peak(362, 183, 91.6),
    "H100": Peak(989, 494.7, 66.9),  # SXM
    "H100 PCIe": Peak(756, 378, 51.2),
    "H100 NVL": Peak(835.5, 417.5, 60),
    "H200": Peak(989, 494.7, 66.9),  # SXM
    "H200 NVL": Peak(835.5, 417.5, 60),
    "B200": Peak(2250, 1125, 75),
    "GB200": Peak(2500, 1250, 80),
}


def peak_of(name: str) -> Peak:
    """The GPU's, by torch.cuda.get_device_name(); zeros where it is not known."""
    words = _words(name)
    fitting = [key for key in PEAKS if set(_words(key)) <= set(words)]
    return PEAKS[max(fitting, key=lambda key: len(_words(key)))] if fitting else Peak(0, 0, 0)


def _words(name: str) -> list[str]:
    return re.split(r"[^A-Z0-9]+", name.upper())
