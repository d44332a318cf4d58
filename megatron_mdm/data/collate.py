"""Samples → a right-padded micro-batch."""

from collections.abc import Sequence

import torch

from megatron_mdm.data.sft import Sample
from megatron_mdm.diffusion.noiser import CleanBatch


def collate(samples: Sequence[Sample], positions: Sequence[int], sample_ids: Sequence[int], pad_id: int) -> CleanBatch:
    """Pad to the longest of the samples. positions: places in the global batch; sample_ids: rows of the data set."""
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    tokens = torch.full((len(samples), int(lengths.max())), pad_id, dtype=torch.int64)
    eligible, delimiters = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.from_numpy(sample.tokens)
        eligible[row, : len(sample.eligible)] = torch.from_numpy(sample.eligible)
        delimiters[row, : len(sample.delimiters)] = torch.from_numpy(sample.delimiters)
    return CleanBatch(tokens, eligible, delimiters, lengths, torch.as_tensor(positions), torch.as_tensor(sample_ids))
