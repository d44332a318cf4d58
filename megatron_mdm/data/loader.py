"""The order of training: which samples make a global batch, and which of them a data-parallel rank takes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.batch import CleanBatch
from megatron_mdm.config.schema import BatchConfig
from megatron_mdm.data.batching import computed_tokens, cut
from megatron_mdm.data.collate import collate
from megatron_mdm.data.sample import Sample
from megatron_mdm.diffusion.objective import GlobalBatch
from megatron_mdm.diffusion.randomness import Purpose, stream

NO_EOS_PADDING = -1


class LocalBatch(NamedTuple):
    micro_batches: list[CleanBatch]  # of this data-parallel rank; some may hold no sample
    global_batch: GlobalBatch
    num_tokens: int  # of the global batch, without padding
    num_computed: int  # of this rank's micro-batches, padding included


class Samples(Protocol):
    """What can be trained on: tokenised samples by row."""

    @property
    def samples(self) -> Sequence[Sample]: ...

    def __len__(self) -> int: ...

    def lengths(self) -> NDArray[np.int64]: ...

    def num_eligible(self) -> NDArray[np.int64]: ...


class TrainLoader:
    """Global batches as a pure function of the step: a resumed run needs no other position.

    Samples come as one endless sequence of epochs, each a permutation by (seed, epoch); step s takes the next n of it.
    Which samples share a micro-batch is batching.py's business; a sample's position, to which noise is tied, is
    independent of that.
    """

    def __init__(
        self,
        data: Samples,
        *,
        batch: BatchConfig,
        views: int,
        data_rank: int,
        data_size: int,
        pad_id: int,
        seed: int,
        eos_padding: int = NO_EOS_PADDING,
        first: int = 0,
    ) -> None:
        """eos_padding: a target token that fills each row from its sample's end to the length of the global batch's
        longest. first: the batch, in the order of the data, that step 0 takes."""
        self.data = data
        self.pad_id = pad_id
        self.seed = seed
        self.eos_padding = eos_padding
        self.config = batch
        self.views = views
        self.global_size = batch.global_size
        self.data_rank = data_rank
        self.data_size = data_size
        self.lengths = data.lengths()
        self.num_eligible = data.num_eligible()
        self.first_batch = first
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Rows of the data set in the global batch of a step [n], by position."""
        first = (self.first_batch + step) * self.global_size
        size = len(self.data)
        places = np.arange(first, first + self.global_size)
        ids = np.empty(self.global_size, dtype=np.int64)
        for epoch in np.unique(places // size):
            here = places // size == epoch
            ids[here] = self._permutation(int(epoch))[places[here] % size]
        return ids

    def batch(self, step: int) -> LocalBatch:
        ids = self.sample_ids(step)
        lengths = self.lengths[ids]
        padding = np.zeros_like(lengths) if self.eos_padding == NO_EOS_PADDING else lengths.max() - lengths
        lengths = lengths + padding
        of_all_ranks = cut(lengths, self.config, self.views, self.data_size)
        mine = of_all_ranks[self.data_rank :: self.data_size]
        micro_batches = []
        for positions in mine:
            samples = [
                _extended(self.data.samples[row], self.eos_padding, int(extra))
                for row, extra in zip(ids[positions], padding[positions])
            ]
            micro_batches.append(collate(samples, positions, ids[positions], self.pad_id))
        return LocalBatch(
            micro_batches,
            GlobalBatch(self.global_size, int(self.num_eligible[ids].sum() + padding.sum())),
            int(lengths.sum()),
            sum(computed_tokens(lengths, positions, self.config.mode) for positions in mine),
        )

    def padded_samples(self) -> Sequence[Sample]:
        """All samples, by row, with the eos padding that the first epoch gives them."""
        size = len(self.data)
        extra = np.zeros(size, dtype=np.int64)
        for start in range(0, size if self.eos_padding != NO_EOS_PADDING else 0, self.global_size):
            ids = self.sample_ids(start // self.global_size - self.first_batch)
            rows = ids[: size - start]  # the last batch holds some of the next epoch, too
            extra[rows] = self.lengths[ids].max() - self.lengths[rows]
        return _Extended(self.data.samples, self.eos_padding, extra)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = stream(self.seed, Purpose.DATA_ORDER, epoch).permutation(len(self.data))
        return self._order


class _Extended(Sequence[Sample]):
    """Samples with target tokens behind each, made when they are asked for."""

    def __init__(self, samples: Sequence[Sample], token: int, extra: NDArray[np.int64]) -> None:
        self.samples = samples
        self.token = token
        self.extra = extra

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Any) -> Any:
        return _extended(self.samples[row], self.token, int(self.extra[row]))


def _extended(sample: Sample, token: int, extra: int) -> Sample:
    """The sample with `extra` target tokens behind it."""
    if not extra:
        return sample
    tokens = np.concatenate([sample.tokens, np.full(extra, token, dtype=np.int32)])
    return sample._replace(tokens=tokens, eligible=np.concatenate([sample.eligible, np.ones(extra, dtype=np.bool_)]))


class PrefetchLoader:
    """A TrainLoader whose next steps are read and collated on a thread of their own while one is trained."""

    def __init__(self, loader: TrainLoader, ahead: int = 2) -> None:
        self.loader = loader
        self.ahead = ahead
        self.global_size = loader.global_size
        self.first_batch = loader.first_batch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")  # one: the loader keeps its permutation
        self._coming: dict[int, Future[LocalBatch]] = {}
        self._lock = threading.Lock()  # of _coming

    def batch(self, step: int) -> LocalBatch:
        """Any thread may ask."""
        with self._lock:
            for wanted in range(step, step + self.ahead + 1):
                if wanted not in self._coming:
                    self._coming[wanted] = self._pool.submit(self.loader.batch, wanted)
            for stale in [other for other in self._coming if not step <= other <= step + self.ahead]:
                self._coming.pop(stale).cancel()
            asked = self._coming.pop(step)
        return asked.result()
