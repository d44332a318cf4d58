"""Samples → a right-padded micro-batch."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mdm.batch import CleanBatch
from megatron_mdm.data.sample import Sample

Indices = Sequence[int] | NDArray[np.int64]


def collate(samples: Sequence[Sample], positions: Indices, sample_ids: Indices, pad_id: int) -> CleanBatch:
    """Pad to the longest of the samples. positions: places in the global batch; sample_ids: rows of the data set.

    Without samples it has no rows, and one column.
    """
    lengths = torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64)
    width = int(lengths.max()) if len(samples) else 1
    tokens = torch.full((len(samples), width), pad_id, dtype=torch.int64)
    eligible, delimiters = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.from_numpy(sample.tokens)
        eligible[row, : len(sample.eligible)] = torch.from_numpy(sample.eligible)
        delimiters[row, : len(sample.delimiters)] = torch.from_numpy(sample.delimiters)
    return CleanBatch(
        tokens,
        eligible,
        delimiters,
        lengths,
        torch.as_tensor(positions, dtype=torch.int64),
        torch.as_tensor(sample_ids, dtype=torch.int64),
        _segments(samples),
    )


def _segments(samples: Sequence[Sample]) -> torch.Tensor | None:
    """[B, K] int64, 0 behind the last segment; None where every sample is one."""
    num_segments = max((len(sample.segments) for sample in samples), default=0)
    if not num_segments:
        return None
    segments = torch.zeros(len(samples), num_segments, dtype=torch.int64)
    for row, sample in enumerate(samples):
        parts = torch.from_numpy(sample.segments) if len(sample.segments) else torch.tensor([len(sample.tokens)])
        segments[row, : len(parts)] = parts
    return segments
