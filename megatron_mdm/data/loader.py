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
from megatron_mdm.data.caption_dropout import CaptionDropout
from megatron_mdm.data.collate import collate
from megatron_mdm.data.image_text import first_target, holds_image, null_prefix, without_caption
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
        caption_dropout: CaptionDropout | None = None,
        first: int = 0,
    ) -> None:
        """eos_padding: a target token that fills each row from its sample's end to the length of the global batch's
        longest. caption_dropout: which images are shown without their caption; None: none. first: the batch, in the
        order of the data, that step 0 takes."""
        self.data = data
        self.pad_id = pad_id
        self.seed = seed
        self.eos_padding = eos_padding
        self.captions = Captions.of(data.samples, caption_dropout) if caption_dropout else None
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
        dropped = self.dropped(step, ids)
        lengths = self.lengths[ids]
        if self.captions:
            lengths = lengths - dropped * self.captions.lengths[ids]
        padding = np.zeros_like(lengths) if self.eos_padding == NO_EOS_PADDING else lengths.max() - lengths
        lengths = lengths + padding
        of_all_ranks = cut(lengths, self.config, self.views, self.data_size)
        mine = of_all_ranks[self.data_rank :: self.data_size]
        micro_batches = []
        for positions in mine:
            samples = [
                self.shown(row, bool(is_dropped), int(extra))
                for row, is_dropped, extra in zip(ids[positions], dropped[positions], padding[positions])
            ]
            micro_batches.append(collate(samples, positions, ids[positions], self.pad_id))
        return LocalBatch(
            micro_batches,
            GlobalBatch(self.global_size, int(self.num_eligible[ids].sum() + padding.sum())),
            int(lengths.sum()),
            sum(computed_tokens(lengths, positions, self.config.mode) for positions in mine),
        )

    def dropped(self, step: int, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of a global batch's samples [n], by position, are shown without their caption."""
        if not self.captions:
            return np.zeros(len(ids), dtype=np.bool_)
        return self.captions.dropout.drops(step, len(ids)) & self.captions.is_image[ids]

    def first_epoch(self) -> Sequence[Sample]:
        """All samples, by row, as the first epoch shows them: with its eos padding, without the captions it drops."""
        size = len(self.data)
        extra = np.zeros(size, dtype=np.int64)
        dropped = np.zeros(size, dtype=np.bool_)
        for start in range(0, size, self.global_size):
            step = start // self.global_size
            ids = self.sample_ids(step - self.first_batch)
            rows = ids[: size - start]  # the last batch holds some of the next epoch, too
            dropped[rows] = self.dropped(step, ids)[: size - start]
            if self.eos_padding != NO_EOS_PADDING:
                extra[rows] = self.lengths[ids].max() - self.lengths[rows]
        return _Shown(self, dropped, extra)

    def shown(self, row: int, is_dropped: bool, extra: int) -> Sample:
        """A row of the data without its caption, or with `extra` target tokens behind it."""
        sample = self.data.samples[row]
        if is_dropped and self.captions:
            sample = without_caption(sample, self.captions.dropout.vocabulary)
        return _extended(sample, self.eos_padding, extra)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = stream(self.seed, Purpose.DATA_ORDER, epoch).permutation(len(self.data))
        return self._order


class Captions(NamedTuple):
    """What a loader must know of its rows to drop captions."""

    dropout: CaptionDropout
    is_image: NDArray[np.bool_]  # [rows]
    lengths: NDArray[np.int64]  # [rows]: tokens that a row of an image loses with its caption

    @classmethod
    def of(cls, samples: Sequence[Sample], dropout: CaptionDropout) -> Captions:
        is_image = np.array([holds_image(sample, dropout.vocabulary) for sample in samples], dtype=np.bool_)
        firsts = np.array([first_target(sample) for sample in samples], dtype=np.int64)
        return cls(dropout, is_image, is_image * (firsts - len(null_prefix(dropout.vocabulary))))


class _Shown(Sequence[Sample]):
    """Samples as an epoch shows them, made when they are asked for."""

    def __init__(self, loader: TrainLoader, dropped: NDArray[np.bool_], extra: NDArray[np.int64]) -> None:
        self.loader = loader
        self.dropped = dropped
        self.extra = extra

    def __len__(self) -> int:
        return len(self.extra)

    def __getitem__(self, row: Any) -> Any:
        return self.loader.shown(row, bool(self.dropped[row]), int(self.extra[row]))


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
