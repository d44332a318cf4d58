"""Losses of rows and of tokens on their way from the device to the host: one copy for all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mdm.batch import ModelInputs, RowStatistics
from megatron_mdm.parallel.host_copy import HostCopy


class StatisticsCopy:
    """Begun when it is made, without waiting for the device."""

    def __init__(self, statistics: Tensor, rows: Sequence[int]) -> None:
        """statistics [fields of RowStatistics, sum of rows] float32 on the device; rows: of each micro-batch."""
        self.copy = HostCopy(statistics)
        self.rows = list(rows)

    @classmethod
    def of(cls, statistics: Sequence[RowStatistics]) -> StatisticsCopy:
        """Of the micro-batches' statistics on the device."""
        whole = torch.cat([torch.stack(list(each)) for each in statistics], dim=1)
        return cls(whole, [len(each.loss) for each in statistics])

    def wait(self) -> list[RowStatistics]:
        """The micro-batches' statistics on the host."""
        return [RowStatistics(*part) for part in self.copy.wait().split(self.rows, dim=1)]


class TokenLossesCopy:
    """Cross-entropies [R, S] of micro-batches. Begun when it is made, as StatisticsCopy is."""

    def __init__(self, losses: Tensor, shapes: Sequence[torch.Size]) -> None:
        """losses [sum of R·S] float32 on the device; shapes: of each micro-batch."""
        self.copy = HostCopy(losses)
        self.shapes = list(shapes)

    @classmethod
    def of(cls, losses: Sequence[Tensor]) -> TokenLossesCopy:
        """Of the micro-batches' losses on the device."""
        return cls(torch.cat([each.reshape(-1) for each in losses]), [each.shape for each in losses])

    def wait(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        """The losses on the host, as wide as the caller's micro-batches, which engines may have padded."""
        parts = self.copy.wait().split([shape.numel() for shape in self.shapes])
        return [
            part.view(shape)[:, : inputs.selected.shape[1]]
            for part, shape, inputs in zip(parts, self.shapes, micro_batches, strict=True)
        ]
