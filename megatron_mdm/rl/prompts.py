"""The prompts of a rollout, in the order of training, and what rewards are given of their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.prompt_set import PromptDataset
from megatron_mdm.data.prompts import EncodedPrompt
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.rl.rewards import columns_of

Ints = NDArray[np.int64]


class RolloutPrompts:
    """Prompts by rollout: one endless sequence of epochs, each a permutation by (seed, epoch), of which rollout r takes
    the r-th part. It is the loader's order, with prompts_per_rollout in place of a global batch."""

    def __init__(self, data: PromptDataset, prompts_per_rollout: int, seed: int) -> None:
        self.data = data
        self.size = prompts_per_rollout
        self.seed = seed
        self._orders: dict[int, Ints] = {}  # of the latest epochs

    def rows(self, rollout: int) -> Ints:
        """Rows of the data [prompts_per_rollout]: a pure function of the rollout."""
        first = rollout * self.size
        epochs = range(first // len(self.data), (first + self.size - 1) // len(self.data) + 1)
        self._orders = {epoch: self._order(epoch) for epoch in epochs}
        begin = first - epochs.start * len(self.data)
        return np.concatenate([self._orders[epoch] for epoch in epochs])[begin : begin + self.size]

    def prompts(self, rows: Sequence[int] | Ints) -> list[EncodedPrompt]:
        return [self.data.prompts[row] for row in rows]

    def texts(self, rows: Sequence[int] | Ints) -> list[str]:
        """What rewards are given as prompts: what the user said last, without the template."""
        return [prompt.turns[-1].content for prompt in self.prompts(rows)]

    def columns(self, rows: Sequence[int] | Ints) -> dict[str, list[Any]]:
        """All columns of the records, a list of values each; rows may repeat, one for each completion."""
        return columns_of([self.data.columns[row] for row in rows])

    def _order(self, epoch: int) -> Ints:
        if epoch in self._orders:
            return self._orders[epoch]
        return stream(self.seed, Purpose.DATA_ORDER, epoch).permutation(len(self.data))
