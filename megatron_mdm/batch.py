"""What travels from the data to the model and back: clean samples, the model's inputs, weights, statistics of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NOT_PACKED = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class CleanBatch:
    """A micro-batch of clean samples, on the host."""

    tokens: Tensor  # [B, S] int64, right-padded
    eligible: Tensor  # [B, S] bool: positions that may be masked and are learnt
    delimiters: Tensor  # [B, S] bool: marks of an answer, which ISAD masks more often
    lengths: Tensor  # [B] int64, without padding
    positions: Tensor  # [B] int64: places in the global batch, 0 … n−1
    sample_ids: Tensor  # [B] int64: rows of the data set
    segments: Tensor | None = None  # [B, K] int64: tokens of a sample's parts that do not see each other, 0 behind

    @property
    def num_eligible(self) -> Tensor:
        """P [B] int64."""
        return self.eligible.sum(1)


class LossWeights(NamedTuple):
    token: Tensor  # [V·B, S] float32: a row's loss is Σ_i token_i · CE_i
    row: Tensor  # [V·B] float32: the global batch's loss is Σ over all its rows of row · (row's loss)


class ModelInputs(NamedTuple):
    """A micro-batch for the model. R rows (samples × views) of length S.

    Packed (engine/inputs.py), its rows stand one after another in a single row of T tokens without padding; what is
    scored stays by row.
    """

    tokens: Tensor  # [R, S] int64; packed: [1, T]
    # [R] int64 without padding on the right; of no dimension where no row is padded, which kernels exploit. Packed:
    # [1, K], the segments that make the row of T, each of which sees itself only.
    lengths: Tensor
    selected: Tensor  # [R, S] bool: the positions that reach the vocabulary (masked ones, in training)
    labels: Tensor  # [R, S] int64: clean token ids
    token_weight: Tensor  # [R, S] float32: a row's loss is Σ token_weight · CE over its selected positions
    row_weight: Tensor  # [R] float32: the total is Σ row_weight · (row's loss)
    row_starts: Tensor = NOT_PACKED  # [R] int64, packed: where the rows begin among the T tokens

    @property
    def is_packed(self) -> bool:
        return self.lengths.dim() == 2

    def to(self, device: torch.device) -> ModelInputs:
        return ModelInputs(*(tensor.to(device, non_blocking=True) for tensor in self))


class RowStatistics(NamedTuple):
    """Per row [R], float32, detached."""

    loss: Tensor  # Σ token_weight · CE
    square: Tensor  # Σ (token_weight · CE)²
    gradient_square: Tensor  # Σ ‖token_weight · ∂CE/∂h‖², h what the vocabulary projection reads; 0 if not computed
