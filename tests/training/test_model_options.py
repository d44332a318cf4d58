"""Biases, norms of heads, their own width and shifted logits: the same gradients on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.checkpoint.tensors import TensorReader
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.models.parameters import parameter_table
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

OPTIONS = {"num_kv_heads": 4, "qkv_bias": True, "qk_norm": True, "head_dim": 16, "logit_shift": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_zero0": (2, {"tensor": 2, "zero": 0}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True, "zero": 1}),
    "tp4_sp": (4, {"tensor": 4, "sequence": True}),
}


def one_step(config: RunConfig, folder: Path) -> float:
    """On a rank: the loss of the first step. Afterwards Adam's first moment is the gradient, up to a factor."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.checkpoint.tensors import Snapshot
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
    loss = trainer.train_step(0).loss
    snapshot = Snapshot(context)
    snapshot.take(trainer.engine.optimizer_state.fragments())
    snapshot.write(folder)
    return loss


def config_of(folder: Path, parallel: dict[str, Any]) -> RunConfig:
    return small_config(folder, model=small_model(**OPTIONS).model_dump(), parallel=parallel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_ids(folder / "train.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> float:
    return run_ranks(one_step, 1, config_of(folder, {"zero": 0}), folder / "reference")[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(name: str, folder: Path, reference: float) -> None:
    num_ranks, parallel = LAYOUTS[name]
    config = config_of(folder, parallel)
    losses = run_ranks(one_step, num_ranks, config, folder / name)
    assert losses == pytest.approx([reference] * num_ranks, rel=1e-5)
    ours = TensorReader(folder / name, config.model)
    expected = TensorReader(folder / "reference", config.model)
    for parameter in parameter_table(config.model):
        gradient, whole = (reader.read(parameter, "exp_avg", 0, 1) for reader in (ours, expected))
        # Norms of heads divide by queries and keys far below 1, which enlarges rounding differences tenfold.
        assert float((gradient - whole).abs().max()) < 1e-5 * float(whole.abs().max()), parameter
