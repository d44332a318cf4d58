"""Pretraining samples from Megatron's .bin/.idx files: sequences of fixed length over shuffled documents, and blends.

Nothing is copied: files are mapped into memory and read where a sample needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.indexed import Shard, find_shards, open_shards
from megatron_mdm.data.sample import Sample
from megatron_mdm.diffusion.randomness import Purpose, stream

Numbers = NDArray[np.int64]


class Corpus:
    """Documents of one or several shards, shuffled once and read one after another, cut every `length` tokens.

    Every token is in exactly one sequence; the last may be shorter.
    """

    def __init__(self, shards: Sequence[Shard], documents: Numbers, length: int, vocab_size: int) -> None:
        """documents: numbers over all shards, in the order in which they are read."""
        self.shards = shards
        self.documents = documents
        self.length = length
        self.vocab_size = vocab_size
        self.first_document = np.cumsum([0, *(len(shard.lengths) for shard in shards)])
        lengths = np.concatenate([shard.lengths for shard in shards])[documents]
        self.ends = np.cumsum(lengths)
        self.num_tokens = int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        """The number of sequences."""
        return -(-self.num_tokens // self.length)

    def size(self, row: Numbers) -> Numbers:
        """The number of tokens of each of these sequences."""
        return np.minimum(self.length, self.num_tokens - row * self.length)

    def read(self, row: int, size: int) -> tuple[NDArray[np.int32], Numbers]:
        """The first `size` tokens of a sequence, and how many of them belong to each document [K]."""
        begin = row * self.length
        end = begin + size
        parts: list[NDArray[np.int32]] = []
        index = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            stop = min(end, int(self.ends[index]))
            if stop > begin:
                number = int(self.documents[index])
                which = int(np.searchsorted(self.first_document, number, side="right")) - 1
                offset = begin - (int(self.ends[index - 1]) if index else 0)
                document = number - int(self.first_document[which])
                parts.append(self._checked(self.shards[which], document, offset, stop - begin))
                begin = stop
            index += 1
        return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)

    def _checked(self, shard: Shard, document: int, offset: int, count: int) -> NDArray[np.int32]:
        tokens = shard.read(document, offset, count)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise UserError(
                f"{shard.prefix}.bin, document {document}: a token id is outside the vocabulary of {self.vocab_size} "
                "ids; it was made with another tokenizer"
            )
        return tokens


@dataclass(frozen=True)
class CorpusDataset:
    """Sequences of one corpus or a blend, by row. Where a corpus is small for its weight, its rows occur again.

    An epoch shows every sequence of the corpus that lasts longest once, and of the others as their weights ask.
    """

    corpora: Sequence[Corpus]
    counts: Numbers  # rows of each corpus in an epoch
    sees_across_documents: bool
    cut_to: Numbers  # [rows]: tokens of each row
    fingerprint: str
    num_bad: int  # documents that could not be read and are left out
    num_too_long: int = 0  # as in SftDataset; sequences are never too long
    first_bad: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        *,
        sees_across_documents: bool,
        random_length: float,
        seed: int,
        fingerprint: str,
        num_bad: int,
    ) -> CorpusDataset:
        """random_length: share of the rows that are cut to a length drawn from U{1 … length} (LLaDA: 0.01)."""
        counts = blend_counts([len(corpus) for corpus in corpora], weights)
        sizes = np.concatenate([corpus.size(np.arange(n) % len(corpus)) for corpus, n in zip(corpora, counts)])
        if random_length:
            generator = stream(seed, Purpose.RANDOM_LENGTH)
            chosen = generator.random(len(sizes)) < random_length
            lengths = generator.integers(1, corpora[0].length + 1, len(sizes))
            sizes = np.where(chosen, np.minimum(sizes, lengths), sizes)
        return cls(corpora, counts, sees_across_documents, sizes, fingerprint, num_bad)

    def __len__(self) -> int:
        return len(self.cut_to)

    @property
    def samples(self) -> Sequence[Sample]:
        return _Rows(self)

    def lengths(self) -> Numbers:
        return self.cut_to

    def num_eligible(self) -> Numbers:
        """The number of target tokens of each row: all of them."""
        return self.cut_to

    def num_delimiters(self) -> Numbers:
        return np.zeros_like(self.cut_to)

    def sample(self, row: int) -> Sample:
        bounds = np.cumsum(self.counts)
        which = int(np.searchsorted(bounds, row, side="right"))
        corpus = self.corpora[which]
        tokens, parts = corpus.read((row - int(bounds[which] - self.counts[which])) % len(corpus), self.cut_to[row])
        sample = Sample.of(tokens, 0)
        return sample if self.sees_across_documents or len(parts) == 1 else sample._replace(segments=parts)


class _Rows(Sequence[Sample]):
    def __init__(self, data: CorpusDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, row: int) -> Sample: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Sample]: ...

    def __getitem__(self, row: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(row, slice):
            return [self.data.sample(index) for index in range(*row.indices(len(self)))]
        return self.data.sample(int(row))


def blend_counts(sizes: Sequence[int], weights: Sequence[float]) -> Numbers:
    """Rows of each corpus in an epoch: in proportion to the weights, and at least one pass over every corpus's rows
    for the one that lasts longest."""
    share = np.array(weights, dtype=np.float64) / np.sum(weights)
    total = np.max(np.array(sizes) / share)
    return np.maximum(1, np.round(share * total)).astype(np.int64)


def read_corpora(
    blend: Mapping[str, float],
    *,
    length: int,
    vocab_size: int,
    tokenizer_path: str,
    sees_across_documents: bool,
    random_length: float,
    validation_fraction: float,
    seed: int,
    skip_bad: bool,
) -> tuple[CorpusDataset, CorpusDataset | None]:
    """(training, validation) from corpora by prefix, with their weights. Documents go to one or the other, by seed."""
    parts: tuple[list[Corpus], list[Corpus]] = ([], [])
    fingerprints = []
    num_bad = 0
    for prefix in blend:
        shards, bad = open_shards(find_shards(prefix), tokenizer_path, vocab_size, skip_bad)
        num_bad += bad
        fingerprints += [shard.fingerprint for shard in shards]
        documents = np.flatnonzero(np.concatenate([shard.readable for shard in shards]))
        order = stream(seed, Purpose.SPLIT).permutation(documents)
        held_out = max(1, round(len(order) * validation_fraction)) if validation_fraction else 0
        if held_out >= len(order):
            raise UserError(f"{prefix}: {len(order)} documents are too few for 'data.validation_fraction'")
        for corpora, chosen in zip(parts, (order[held_out:], order[:held_out])):
            corpora.append(Corpus(shards, chosen, length, vocab_size))
        if not parts[0][-1].num_tokens:
            raise UserError(f"{prefix}: the corpus is empty")
    weights = list(blend.values())
    fingerprint = " ".join(fingerprints)

    def dataset(corpora: list[Corpus], random_length: float) -> CorpusDataset:
        return CorpusDataset.of(
            corpora,
            weights,
            sees_across_documents=sees_across_documents,
            random_length=random_length,
            seed=seed,
            fingerprint=fingerprint,
            num_bad=num_bad,
        )

    return dataset(parts[0], random_length), dataset(parts[1], 0.0) if validation_fraction else None
