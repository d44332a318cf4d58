"""Pretraining on a corpus through the program: calibration, training, validation, on other ranks and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.data.splits import read_held_out, read_splits
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.ranks import run_program_ranks
from tests.small import EOS, MASK, PAD, VOCAB, small_model


def write_corpus(prefix: Path, num_documents: int) -> None:
    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(num_documents):
        size = int(generator.integers(3, 30))
        builder.add_document(np.arange(size) % 7 + 2, [size])
    builder.finalize(f"{prefix}.idx")


def write_config(folder: Path, run: str) -> Path:
    sections: dict[str, Any] = {
        "model": small_model().model_dump(),
        "data": {"format": "corpus", "train": {str(folder / "a"): 0.6, str(folder / "b"): 0.4}}
        | {"mask_token": MASK, "pad_token": PAD, "eos_token": EOS, "max_length": 32, "validation_fraction": 0.1}
        | {"across_documents": False, "random_length": 0.1},
        "diffusion": {"t_sampler": "ppots", "views": 2, "strata": "full"}
        | {"calibration": {"num_samples": 3, "num_times": 10, "num_masks": 4, "num_restarts": 2}},
        "batch": {"global_size": 8, "micro_size": 4},
        "optimizer": {"lr": 3e-3},
        "schedule": {"steps": 20},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"directory": str(folder / run), "save_every": 10},
        "logging": {"every": 1, "tensorboard": False},
        "evaluation": {"every": 10, "num_samples": 16},
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def losses(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def run(*arguments: str, ranks: int) -> None:
    for result in run_program_ranks("launch/train.py", list(arguments), ranks):
        assert result.exit_code == 0, result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "a", 150)
    write_corpus(tmp_path / "b", 60)
    return tmp_path


def test_pretraining_goes_the_same_way_on_other_ranks_and_batches(folder: Path) -> None:
    run("--config", str(write_config(folder, "one")), ranks=1)
    config = str(write_config(folder, "two"))
    packed = ["batch.mode=packed", "batch.micro_tokens=96"]
    run("--config", config, "schedule.steps=20", *packed, ranks=2)
    np.testing.assert_allclose(losses(folder / "two", "loss"), losses(folder / "one", "loss"), rtol=1e-5)
    validation = losses(folder / "one", "validation_loss")
    np.testing.assert_allclose(losses(folder / "two", "validation_loss"), validation, rtol=1e-5)
    assert validation[-1] < validation[0]


def test_perplexity_of_the_corpus_that_a_run_was_trained_on(folder: Path) -> None:
    """The run's own validation split without naming it, and a prefix."""
    config = load_config(write_config(folder, "run"), ["schedule.steps=2", "diffusion.t_sampler=uniform"])
    (folder / "run.yaml").write_text(dump_config(config))
    run("--config", str(folder / "run.yaml"), ranks=1)
    _, validation = read_splits(config, load_tokenizer(config.data))
    assert validation is not None
    whole = read_held_out(str(folder / "b"), config, load_tokenizer(config.data))
    for data, expected in (([], validation), (["--data", str(folder / "b"), "--limit", "3"], whole)):
        arguments = ["--run-dir", str(folder / "run"), "--task", "perplexity", *data, "num_times=2", "num_repeats=2"]
        (result,) = run_program_ranks("launch/evaluate.py", arguments)
        assert result.exit_code == 0, result.stderr
        found = json.loads((folder / "run" / "perplexity.json").read_text())
        assert found["num_tokens"] == expected.lengths()[: 3 if data else None].sum()
        assert 0.0 < found["nats_per_token"] < 2 * np.log(VOCAB)
