"""How much memory a denoising step takes, from settings alone: the forward pass's shape, and bytes around its logits.

What is counted is what sampler.py and candidates.py make; tests/training/test_plan_rl.py counts the real allocations.
"""

from __future__ import annotations

from megatron_mdm.engine.communication import MicroBatchShape
from megatron_mdm.generation.candidates import ELEMENTS
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.models.kernel_memory import Kernels

_NOISE = 24  # bytes for each number that is hashed at a time
_CONFIDENCE = {"entropy": 24, "topk_margin": 8}  # bytes a number, beside the tables; other rules go part by part


def decoding_shape(config: GenerationConfig, length: int) -> MicroBatchShape:
    """The greatest forward pass: rows of prompt and response of this length in all, with all of a block masked."""
    rows = config.batch_size * (2 if config.cfg_scale else 1)
    return MicroBatchShape(rows, length, rows * config.block_length)


def logits_bytes(config: GenerationConfig, vocab_size: int, size: int, tensor: int, kernels: Kernels) -> float:
    """Bytes at the peak of a step behind its forward pass. size: of a logit as the head gives it; tensor: degree of
    parallelism, over which logits are gathered."""
    copies = 2 if config.cfg_scale else 1
    wide = 8 if config.temperature else 0  # logits / temperature, beside the logits
    drawn = wide or 4  # what candidates are drawn from
    is_bent = config.top_p < 1.0 or config.top_k > 0
    tables = 4 + (drawn if wide or is_bent else 0)
    of_a_number = [
        copies * size * (2 + 1 / tensor if tensor > 1 else 1),  # in the head
        copies * (4 + (size if size < 4 else 0)),  # brought to float32
        16 if copies == 2 else 0,  # the copies' logits, their difference, and that with a factor
        4 + wide + 3 * drawn + 8 if config.top_p < 1.0 else 0,  # sorted, with places, and two sums
        4 + wide + drawn + 1 if config.top_k else 0,
        2 * tables if config.eos == "last" else 0,
        tables + _CONFIDENCE.get(config.remasking, 0) + 8 * (config.remasking in _CONFIDENCE and not wide),
    ]
    number = config.batch_size * config.block_length * vocab_size
    at_a_time = min(ELEMENTS[kernels], number)
    at_a_time *= _NOISE if config.temperature else 8
    on_host = 8 * number if config.noise == "host" and config.temperature and kernels == "cpu" else 0
    return float(max(of_a_number) * number + at_a_time + on_host)
