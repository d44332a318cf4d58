"""Batches that are prepared a step ahead are those that would be made when they are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import ParallelConfig, RunConfig
from megatron_mdm.data.loader import PrefetchLoader, TrainLoader
from megatron_mdm.data.splits import read_splits
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import ClippedSampler
from megatron_mdm.engine.inputs import InputLayout
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.ahead import OneStepAhead
from megatron_mdm.training.source import Prepared, SupervisedSource
from tests.small import MASK, PAD, small_config, write_ids

CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed, MIRROR": {"batch": {"mode": "packed"}, "diffusion": {"views": 2, "strata": "full"}},
    "masked tokens counted": {"batch": {"mode": "bucketed"}, "diffusion": {"normalization": "masked"}},
    "next tokens": {"objective": {"name": "autoregressive"}},
    "a multiple": {"parallel": {"tensor": 2, "sequence": True}},
}


def source_of(config: RunConfig, layout: InputLayout | None) -> SupervisedSource:
    tokenizer = load_tokenizer(config.data)
    train, _ = read_splits(config, tokenizer)
    loader = TrainLoader(
        train,
        batch=config.batch,
        views=config.diffusion.rows_per_sample,
        data_rank=0,
        data_size=1,
        pad_id=PAD,
        seed=config.seed,
    )
    objective = objective_of(config)
    context = ParallelContext(0, Layout.of(1, ParallelConfig()), {}, cast(Any, None))
    return SupervisedSource(context, PrefetchLoader(loader), objective, objective.noise(np.empty(0), MASK), layout)


def assert_same(found: Prepared, expected: Prepared, layout: InputLayout) -> None:
    for mine, other in zip(found.micro_batches, expected.micro_batches, strict=True):
        tensors = mine.as_tensors()
        others = layout(other).as_tensors()
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.equal(others[name]), name
    for weights, others in zip(found.content.batch.weights, expected.content.batch.weights, strict=True):
        assert all(map(torch.equal, weights, others))


@pytest.mark.parametrize("name", CASES)
def test_what_is_prepared_ahead_is_the_same(name: str, tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 30)
    config = small_config(tmp_path, **CASES[name])
    layout = InputLayout.of(config)
    ahead = source_of(config, layout)
    plain = source_of(config, None)
    for step in (0, 1, 2, 9, 10, 3, 3):  # jumps, as after a rewind
        assert_same(ahead.prepare(step), plain.prepare(step), layout)


@pytest.mark.parametrize("normalization", ["sample", "masked"])
def test_another_density_of_t_undoes_what_was_prepared(normalization: str, tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 30)
    config = small_config(tmp_path, diffusion={"normalization": normalization})
    layout = InputLayout.of(config)
    ahead = source_of(config, layout)
    plain = source_of(config, None)
    for step in range(6):
        assert_same(ahead.prepare(step), plain.prepare(step), layout)
        if step % 2:  # step + 1 is being prepared, or has been
            for source in (ahead, plain):
                assert isinstance(source.noise, Noiser)
                source.noise.use(ClippedSampler((0.1 * step, 1.0)))


def test_only_the_next_step_is_made_and_once() -> None:
    made = []

    def make(step: int) -> int:
        made.append(step)
        return -step

    ahead = OneStepAhead(make, lambda step: (np.array([0.0]), np.array([1.0])))
    assert [ahead(step) for step in (0, 1, 2)] == [0, -1, -2]
    assert ahead(3) == -3  # by now, all before it is done
    assert made[:4] == [0, 1, 2, 3]


def test_an_error_of_the_thread_is_raised_at_its_step() -> None:
    def make(step: int) -> int:
        return 1 // (2 - step)

    ahead = OneStepAhead(make, lambda step: (np.array([0.0]), np.array([1.0])))
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        ahead(2)
