"""How a global batch is cut into micro-batches: by order, by length, or to be packed without padding."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.schema import BatchConfig

Positions = NDArray[np.int64]
Lengths = NDArray[np.int64]


def cut(lengths: Lengths, batch: BatchConfig, views: int, num_ranks: int) -> list[Positions]:
    """Positions in the global batch of each micro-batch. Micro-batch j goes to data-parallel rank j mod num_ranks.

    lengths [n]: tokens of the samples. Every rank gets the same number of micro-batches, of similar cost in each turn
    and in total; where there are too few samples for that, some are empty. The result is the same on every rank.
    """
    micro_batches = _evened(CUTS[batch.mode](lengths, batch, views, num_ranks), num_ranks)
    costs = [computed_tokens(lengths, positions, batch.mode) for positions in micro_batches]
    assigned = list(micro_batches)
    loads = [0] * num_ranks
    turns = [range(start, min(start + num_ranks, len(costs))) for start in range(0, len(costs), num_ranks)]
    # The costliest turns first, and of a turn the costliest micro-batch to the rank that has least so far.
    for turn in sorted(turns, key=lambda turn: -max(costs[index] for index in turn)):
        ranks = sorted(range(len(turn)), key=lambda rank: loads[rank])
        for rank, index in zip(ranks, sorted(turn, key=lambda index: -costs[index])):
            assigned[turn.start + rank] = micro_batches[index]
            loads[rank] += costs[index]
    return assigned


def computed_tokens(lengths: Lengths, positions: Positions, mode: str) -> int:
    """Tokens that the model sees of a micro-batch in one view, padding included."""
    if not len(positions):
        return 0
    of_micro_batch = lengths[positions]
    return int(of_micro_batch.sum() if mode == "packed" else len(positions) * of_micro_batch.max())


def _padded(lengths: Lengths, batch: BatchConfig, views: int, num_ranks: int) -> list[Positions]:
    """Micro-batches in the order of the global batch, each padded to its longest sample."""
    return _runs(np.arange(len(lengths)), batch.micro_size)


def _bucketed(lengths: Lengths, batch: BatchConfig, views: int, num_ranks: int) -> list[Positions]:
    """Samples of like length together: micro_size of them, or as many as the token budget holds with their padding."""
    by_length = np.argsort(lengths, kind="stable")
    if not batch.micro_tokens:
        return _runs(by_length, batch.micro_size)
    buckets: list[Positions] = []
    end = len(by_length)
    while end:  # from the longest down: the last of a bucket is what the others are padded to
        rows = max(1, batch.micro_tokens // (views * int(lengths[by_length[end - 1]])))
        buckets.append(by_length[max(0, end - rows) : end])
        end = max(0, end - rows)
    buckets = _evened(buckets, num_ranks)  # before they are put in order
    return sorted(buckets, key=lambda bucket: -len(bucket) * int(lengths[bucket].max()) if len(bucket) else 0)


def _packed(lengths: Lengths, batch: BatchConfig, views: int, num_ranks: int) -> list[Positions]:
    """As few packs as the token budget allows (else global / micro size), with their tokens balanced."""
    if not batch.micro_tokens:
        return _balanced(lengths, _rounded_up(math.ceil(len(lengths) / batch.micro_size), num_ranks))
    budget = batch.micro_tokens // views
    num_packs = _rounded_up(math.ceil(int(lengths.sum()) / budget), num_ranks)
    while True:
        packs = _balanced(lengths, num_packs)
        fullest = max(int(lengths[pack].sum()) for pack in packs)
        if fullest <= max(budget, int(lengths.max())) or num_packs >= len(lengths):
            return packs
        num_packs += num_ranks


CUTS: dict[str, Callable[[Lengths, BatchConfig, int, int], list[Positions]]] = {
    "padded": _padded,
    "bucketed": _bucketed,
    "packed": _packed,
}


def _balanced(lengths: Lengths, num_packs: int) -> list[Positions]:
    """Longest first, each to the pack with the fewest tokens; packs in order of tokens, most first."""
    loads = [(0, pack) for pack in range(num_packs)]
    members: list[list[int]] = [[] for _ in range(num_packs)]
    for position in np.argsort(-lengths, kind="stable").tolist():
        load, pack = loads[0]
        members[pack].append(position)
        heapq.heapreplace(loads, (load + int(lengths[position]), pack))
    packs = [np.array(sorted(pack), dtype=np.int64) for pack in members]
    return sorted(packs, key=lambda pack: -int(lengths[pack].sum()))


def _evened(buckets: list[Positions], num_ranks: int) -> list[Positions]:
    """Split the buckets with the most samples until there are as many for every rank; halves may be empty."""
    missing = -len(buckets) % num_ranks
    for _ in range(missing):
        widest = max(range(len(buckets)), key=lambda index: len(buckets[index]))
        bucket = buckets[widest]
        buckets[widest : widest + 1] = [bucket[: len(bucket) // 2], bucket[len(bucket) // 2 :]]
    return buckets


def _runs(order: Positions, size: int) -> list[Positions]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
