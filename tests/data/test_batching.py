"""Micro-batches: every sample once, budgets kept, ranks in step; and the order of samples on any ranks and after a
resume."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import BatchConfig, DataConfig
from megatron_mdm.config.validate import accumulation_steps, validate
from megatron_mdm.data.batching import CUTS, computed_tokens, cut
from megatron_mdm.data.collate import collate
from megatron_mdm.data.loader import LocalBatch, PrefetchLoader, TrainLoader
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.sft import SftDataset, read_sft
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.small import EOS, MASK, PAD, VOCAB, small_config, write_ids

BATCHINGS: list[dict[str, Any]] = [
    {"mode": "padded", "micro_size": 2},
    {"mode": "bucketed", "micro_size": 2},
    {"mode": "bucketed", "micro_tokens": 100},
    {"mode": "packed", "micro_size": 2},
    {"mode": "packed", "micro_tokens": 100},
]


def lengths_of(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(3.0, 0.5, size).clip(2, 50).astype(np.int64)


@pytest.mark.parametrize("batching", BATCHINGS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("views", [1, 2])
def test_every_sample_once_within_the_budget(batching: dict[str, Any], ranks: int, views: int) -> None:
    batch = BatchConfig(**{"global_size": 16, "micro_size": 4, **batching})
    most = 0
    for seed in range(20):
        lengths = lengths_of(16, seed)
        parts = cut(lengths, batch, views, ranks)
        assert sorted(np.concatenate(parts)) == list(range(16))
        assert len(parts) % ranks == 0
        if batch.micro_tokens:
            assert max(views * computed_tokens(lengths, part, batch.mode) for part in parts) <= 100
        most = max(most, len(parts) // ranks)
    config = small_config(Path("unused"), data={"train": "x", "max_length": 50}, diffusion={"views": views})
    config = config.model_copy(update={"batch": batch})
    assert most <= accumulation_steps(config, ranks) or batch.mode == "packed"


def test_no_padding_where_packed_and_little_where_bucketed() -> None:
    lengths = lengths_of(64, 0)
    efficiency = {}
    for mode in CUTS:
        batch = BatchConfig(global_size=64, micro_size=8, mode=mode)
        parts = cut(lengths, batch, 1, 1)
        efficiency[mode] = lengths.sum() / sum(computed_tokens(lengths, part, mode) for part in parts)
    assert efficiency["padded"] < 0.7 < efficiency["bucketed"] < efficiency["packed"] == 1.0


def test_packs_are_even() -> None:
    """So that data-parallel ranks do not wait for each other: within the longest sample of the mean."""
    lengths = lengths_of(64, 1)
    packs = cut(lengths, BatchConfig(global_size=64, micro_size=8, mode="packed"), 1, 4)
    loads = [lengths[pack].sum() for pack in packs]
    assert max(loads) - min(loads) <= lengths.max()
    assert len(packs) == 8


def test_settings_that_do_not_go_together() -> None:
    def check(**batch: Any) -> None:
        config = small_config(Path("x"), diffusion={"views": 2}, batch={"global_size": 8, "micro_size": 2, **batch})
        validate(config, 1)

    check(mode="packed", micro_tokens=128)
    check(mode="packed", micro_tokens=128, global_size=7)  # a budget fits any number of samples
    check(mode="packed", global_size=8, micro_size=8)
    with pytest.raises(UserError, match=r"'batch.micro_tokens' needs 'batch.mode' bucketed or packed"):
        check(mode="padded", micro_tokens=128)
    with pytest.raises(UserError, match=r"cannot hold one sample: 2 rows a sample × 64 .* = 128 tokens"):
        check(mode="packed", micro_tokens=127)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SftDataset:
    path = write_ids(tmp_path_factory.mktemp("batching") / "a.jsonl", 37)  # epochs end inside global batches
    config = DataConfig(train="x", mask_token=MASK, pad_token=PAD, eos_token=EOS, max_length=64)
    return read_sft(str(path), load_tokenizer(config), config, VOCAB)


def loader(data: SftDataset, batching: dict[str, Any], rank: int, ranks: int) -> TrainLoader:
    batch = BatchConfig(**{"global_size": 8, "micro_size": 2, **batching})
    return TrainLoader(data, batch=batch, views=1, data_rank=rank, data_size=ranks, pad_id=PAD, seed=5)


def global_batch(data: SftDataset, batching: dict[str, Any], ranks: int, step: int) -> dict[int, tuple[int, ...]]:
    """Position → (row of the data set, tokens …), put together from all ranks."""
    seen: dict[int, tuple[int, ...]] = {}
    for rank in range(ranks):
        for micro in loader(data, batching, rank, ranks).batch(step).micro_batches:
            for row, position in enumerate(micro.positions.tolist()):
                assert position not in seen
                tokens = micro.tokens[row, : int(micro.lengths[row])].tolist()
                seen[position] = (int(micro.sample_ids[row]), *tokens)
    return seen


@pytest.mark.parametrize("batching", BATCHINGS, ids=str)
def test_order_is_the_same_on_any_ranks_and_after_a_resume(batching: dict[str, Any], data: SftDataset) -> None:
    """Loaders that start at 20 random steps give what one gives that ran from step 0, bit for bit."""
    running = loader(data, batching, 0, 1)
    steps = np.random.default_rng(0).choice(60, 20, replace=False).tolist()
    for step in range(60):
        local = running.batch(step)
        if step not in steps:
            continue
        expected = {
            position: sample_id
            for micro in local.micro_batches
            for position, sample_id in zip(micro.positions.tolist(), micro.sample_ids.tolist())
        }
        whole = global_batch(data, batching, 1, step)
        assert {position: row[0] for position, row in whole.items()} == expected
        for ranks in (2, 4):
            assert global_batch(data, batching, ranks, step) == whole


@pytest.mark.parametrize("batching", BATCHINGS, ids=str)
def test_an_epoch_repeats_and_loses_nothing(batching: dict[str, Any], data: SftDataset) -> None:
    rows = [global_batch(data, batching, 2, step)[position][0] for step in range(14) for position in range(8)]
    for epoch in range(3):
        assert sorted(rows[37 * epoch : 37 * (epoch + 1)]) == list(range(37))


def test_prefetching_changes_nothing(data: SftDataset) -> None:
    plain, ahead = (loader(data, {"mode": "packed"}, 0, 2) for _ in range(2))
    fetching = PrefetchLoader(ahead)
    for step in [0, 1, 2, 3, 9, 10, 4, 5]:  # jumps, as after a resume in the same process
        ours = fetching.batch(step)
        theirs = plain.batch(step)
        assert ours.num_tokens == theirs.num_tokens
        for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert one.tokens.equal(other.tokens)
            assert one.positions.equal(other.positions)


def test_what_was_read_ahead_is_released_after_a_jump(data: SftDataset) -> None:
    alive: dict[int, weakref.ref[Any]] = {}

    class Watched(TrainLoader):
        def batch(self, step: int) -> LocalBatch:
            local = super().batch(step)
            alive[step] = weakref.ref(local.micro_batches[0].tokens)
            return local

    config = BatchConfig(global_size=8, micro_size=2)
    fetching = PrefetchLoader(Watched(data, batch=config, views=1, data_rank=0, data_size=1, pad_id=PAD, seed=5))
    for step in (0, 20, 40):
        fetching.batch(step)
    fetching.batch(41)  # what was under way at the jumps has been read
    assert not [step for step, tokens in alive.items() if step < 40 and tokens() is not None]


def test_micro_batches_are_padded_with_the_padding_token() -> None:
    """A whole sample beside one of several segments is one segment."""
    parts = Sample.of(np.arange(2, 7, dtype=np.int32), 2)._replace(segments=np.array([2, 3]))
    batch = collate([Sample.of(np.arange(2, 5, dtype=np.int32), 1), parts], [0, 1], [0, 1], pad_id=9)
    assert batch.tokens.tolist() == [[2, 3, 4, 9, 9], [2, 3, 4, 5, 6]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[3, 0], [2, 3]]
    assert batch.eligible.tolist() == [[False, True, True, False, False], [False, False, True, True, True]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps_of_accumulation_hold_what_does_not_divide(ranks: int) -> None:
    """7 samples of full length: the most micro-batches that a rank may get."""
    batch = BatchConfig(global_size=7, micro_size=1, mode="bucketed", micro_tokens=100)
    config = small_config(Path("unused"), data={"train": "x", "max_length": 50})
    parts = cut(np.full(7, 50), batch, 1, ranks)
    steps = accumulation_steps(config.model_copy(update={"batch": batch}), ranks)
    assert steps >= len(parts) // ranks
    assert steps == {1: 4, 2: 2, 3: 2}[ranks]


def test_an_error_in_the_background_is_raised(data: SftDataset) -> None:
    broken = loader(data, {}, 0, 1)
    broken.data = SftDataset([], 0, "")
    with pytest.raises(IndexError):
        PrefetchLoader(broken).batch(0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_like_work_in_sum(ranks: int) -> None:
    """Lengths of a heavy tail in buckets: distributed in the order of their lengths, the last rank would have most."""
    lengths = np.sort(np.random.default_rng(0).lognormal(4.0, 0.8, 64).astype(np.int64) + 1)
    parts = cut(lengths, BatchConfig(global_size=64, micro_size=4, mode="bucketed"), 1, ranks)
    costs = np.array([computed_tokens(lengths, part, "bucketed") for part in parts]).reshape(-1, ranks)
    one_way = np.sort(costs, axis=1).sum(0)
    both_ways = costs.sum(0)
    assert np.ptp(both_ways) < np.ptp(one_way) / 2
