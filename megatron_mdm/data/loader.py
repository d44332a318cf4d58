"""The order of training: which samples make a global batch, and which of them a data-parallel rank takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.collate import collate
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.noiser import CleanBatch
from megatron_mdm.diffusion.objective import GlobalBatch
from megatron_mdm.diffusion.randomness import Purpose, stream


class LocalBatch(NamedTuple):
    micro_batches: list[CleanBatch]  # of this data-parallel rank
    global_batch: GlobalBatch
    num_tokens: int  # of the global batch, without padding


class TrainLoader:
    """Global batches as a pure function of the step: a resumed run needs no other position.

    Samples come as one endless sequence of epochs, each a permutation by (seed, epoch); step s takes the next n of it.
    Within a global batch, samples of like length share a micro-batch; their position, to which noise is tied, is
    independent of that.
    """

    def __init__(
        self,
        data: SftDataset,
        *,
        global_size: int,
        micro_size: int,
        data_rank: int,
        data_size: int,
        pad_id: int,
        seed: int,
    ) -> None:
        assert global_size % (micro_size * data_size) == 0, (global_size, micro_size, data_size)
        self.data, self.pad_id, self.seed = data, pad_id, seed
        self.global_size, self.micro_size = global_size, micro_size
        self.data_rank, self.data_size = data_rank, data_size
        self.lengths, self.num_eligible = data.lengths(), data.num_eligible()
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Rows of the data set in the global batch of a step [n], by position."""
        first, size = step * self.global_size, len(self.data)
        places = np.arange(first, first + self.global_size)
        ids = np.empty(self.global_size, dtype=np.int64)
        for epoch in np.unique(places // size):
            here = places // size == epoch
            ids[here] = self._permutation(int(epoch))[places[here] % size]
        return ids

    def batch(self, step: int) -> LocalBatch:
        ids = self.sample_ids(step)
        by_length = np.argsort(self.lengths[ids], kind="stable")
        stride = self.micro_size * self.data_size
        micro_batches = []
        for start in range(self.data_rank * self.micro_size, self.global_size, stride):
            positions = by_length[start : start + self.micro_size]
            samples = [self.data.samples[row] for row in ids[positions]]
            micro_batches.append(collate(samples, positions, ids[positions], self.pad_id))
        return LocalBatch(
            micro_batches,
            GlobalBatch(self.global_size, int(self.num_eligible[ids].sum())),
            int(self.lengths[ids].sum()),
        )

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = stream(self.seed, Purpose.DATA_ORDER, epoch).permutation(len(self.data))
        return self._order
