"""The order of samples: a function of seed and step, whatever the ranks and the micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import BatchConfig, DataConfig
from megatron_mdm.data.loader import TrainLoader
from megatron_mdm.data.sft import SftDataset, read_sft
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.small import EOS, MASK, PAD, VOCAB, write_ids


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SftDataset:
    path = write_ids(tmp_path_factory.mktemp("loader") / "a.jsonl", 30)
    config = DataConfig(train="x", mask_token=MASK, pad_token=PAD, eos_token=EOS, max_length=64)
    return read_sft(str(path), load_tokenizer(config), config, VOCAB)


def loader(data: SftDataset, micro_size: int = 2, rank: int = 0, ranks: int = 1, **batch: Any) -> TrainLoader:
    config = BatchConfig(global_size=8, micro_size=micro_size, **batch)
    return TrainLoader(data, batch=config, views=1, data_rank=rank, data_size=ranks, pad_id=PAD, seed=5)


def test_an_epoch_has_every_sample_once(data: SftDataset) -> None:
    stream = np.concatenate([loader(data).sample_ids(step) for step in range(15)])  # 4 epochs of 30
    for epoch in range(4):
        assert sorted(stream[epoch * 30 : (epoch + 1) * 30]) == list(range(30))
    assert stream[:30].tolist() != stream[30:60].tolist()


@pytest.mark.parametrize(("micro_size", "ranks"), [(8, 1), (2, 1), (2, 2), (1, 4), (4, 2)])
def test_ranks_share_the_global_batch(data: SftDataset, micro_size: int, ranks: int) -> None:
    for step in (0, 3, 11):
        expected = loader(data).sample_ids(step)
        seen = {}
        for rank in range(ranks):
            local = loader(data, micro_size, rank, ranks).batch(step)
            assert len(local.micro_batches) == 8 // micro_size // ranks
            for batch in local.micro_batches:
                for row, (position, sample_id) in enumerate(zip(batch.positions.tolist(), batch.sample_ids.tolist())):
                    seen[position] = sample_id
                    sample = data.samples[sample_id]
                    length = int(batch.lengths[row])
                    assert batch.tokens[row, :length].tolist() == sample.tokens.tolist()
                    assert (batch.tokens[row, length:] == PAD).all()
                    assert batch.eligible[row, :length].tolist() == sample.eligible.tolist()
                    assert not batch.eligible[row, length:].any()
            assert local.global_batch.num_eligible == data.num_eligible()[expected].sum()
            assert local.num_tokens == data.lengths()[expected].sum()
        assert [seen[position] for position in range(8)] == expected.tolist()


def test_like_lengths_share_a_micro_batch(data: SftDataset) -> None:
    batches = loader(data).batch(0).micro_batches
    longest = [int(batch.lengths.max()) for batch in batches]
    assert longest == sorted(longest)
