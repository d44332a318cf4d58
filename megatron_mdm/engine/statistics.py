"""Row statistics on their way from the device to the host: one copy for all micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mdm.batch import RowStatistics
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
