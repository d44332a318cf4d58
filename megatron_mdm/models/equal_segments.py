"""Segments of one row that are all of one length, as micro-batches of a corpus have them: the rows of a batch.

cuDNN's attention, which is the fastest where it has a plan, makes one for every new shape. On an H200 it reached 439
and 566 TFLOP/s of both passes with heads 64 and 128 wide, torch's variable-length kernel 264 and 306.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

if TYPE_CHECKING:
    from megatron_mdm.models.attention import Executor, Kernel, Visibility

# The first that takes the inputs runs them. That cuDNN is left out elsewhere (models/spec.py) does not matter here.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class EqualSegments:
    """An Executor for segments of one length: a kernel with cuDNN allowed, for few shapes of inputs."""

    def __init__(self, kernel: Kernel, otherwise: Executor, most_shapes: int = 16) -> None:
        """otherwise: runs what comes after the first most_shapes shapes."""
        self.kernel = kernel
        self.otherwise = otherwise
        self.most_shapes = most_shapes
        self.shapes: set[Hashable] = set()
        self.has_said = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float | None) -> Tensor:
        """query [K·S, 1, heads, D], key and value [K·S, 1, kv heads, D] → [K·S, 1, heads · D]."""
        sizes = visible.segments.sizes
        causal = visible.pattern.causal
        if not self._admits((len(sizes), query.shape, key.shape, query.dtype, causal)):
            return self.otherwise(query, key, value, visible, scale)
        query, key, value = (
            x.squeeze(1).unflatten(0, (len(sizes), sizes[0])).transpose(1, 2) for x in (query, key, value)
        )
        with sdpa_kernel(BACKENDS, set_priority=True):
            context = self.kernel(query, key, value, None, scale, causal)  # [K, heads, S, D]
        return context.transpose(1, 2).flatten(2).flatten(0, 1).unsqueeze(1)

    def _admits(self, shape: Hashable) -> bool:
        """Whether a plan for it exists or may be made."""
        if len(self.shapes) < self.most_shapes:
            self.shapes.add(shape)
        admitted = shape in self.shapes
        if not admitted and not self.has_said:
            self.has_said = True
            if not dist.is_initialized() or dist.get_rank() == 0:
                tqdm.write(
                    f"attention: segments of one length had more than {self.most_shapes} shapes; cuDNN runs the first "
                    f"{self.most_shapes}, further ones run as segments of any lengths",
                    file=sys.stderr,
                )
        return admitted
