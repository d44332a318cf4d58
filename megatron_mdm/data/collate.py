"""Samples → a right-padded micro-batch."""

from collections.abc import Sequence

import torch

from megatron_mdm.data.sft import Sample
from megatron_mdm.diffusion.noiser import CleanBatch


def collate(samples: Sequence[Sample], positions: Sequence[int], sample_ids: Sequence[int], pad_id: int) -> CleanBatch:
    """Pad to the longest of the samples. positions: places in the global batch; sample_ids: rows of the data set."""
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    tokens = torch.full((len(samples), int(lengths.max())), pad_id, dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.from_numpy(sample.tokens)
    place = torch.arange(tokens.shape[1])[None, :]
    prompt_lengths = torch.tensor([sample.prompt_length for sample in samples])
    eligible = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])
    return CleanBatch(tokens, eligible, lengths, torch.as_tensor(positions), torch.as_tensor(sample_ids))
