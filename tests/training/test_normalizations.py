"""Every normalisation is one of the global batch: 10 losses are equal on ranks, micro-batches and packings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.objectives import objective_of
from tests.ranks import run_ranks
from tests.small import small_config, write_ids

DIFFUSION = {"t_sampler": "ppots", "views": 2, "isad": {"delimiters": [7]}}
NAMES = sorted(NORMALIZATIONS, key=lambda name: not name.endswith("masked"))  # those that count masks come first
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # normalisations, batch section, parallel section
    "packed_dp2": (len(NAMES), {"mode": "packed", "micro_tokens": 96}, {"zero": 2}),
    "accumulated_pp2": (2, {"micro_size": 2}, {"pipeline": 2}),
}


def trained(config: RunConfig, names: list[str]) -> dict[str, list[float]]:
    """On a rank: 10 losses by normalisation, one after another with the same engine."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.objectives import objective_of
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs
    from megatron_mdm.training.source import SupervisedSource

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    artifact = {"cell_density": (2.0 - np.arange(4096) / 4096).tolist()}
    trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), artifact, context)
    losses = {}
    for name in names:
        diffusion = config.diffusion.model_copy(update={"normalization": name})
        objective = objective_of(config.model_copy(update={"diffusion": diffusion}))
        source = SupervisedSource(context, trainer.source.loader, objective, trainer.source.noise)
        trainer = dataclasses.replace(trainer, source=source)
        losses[name] = [trainer.train_step(step).loss for step in range(10)]
    return losses


def config_of(folder: Path, batch: dict[str, Any], parallel: dict[str, Any]) -> RunConfig:
    return small_config(
        folder,
        data={"max_length": 24},
        diffusion=DIFFUSION,
        batch=batch,
        parallel=parallel,
        optimizer={"lr": 1e-3},
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("normalizations")
    write_ids(folder / "train.jsonl", 40)
    return folder, run_ranks(trained, 1, config_of(folder, {"mode": "padded", "micro_size": 8}, {"zero": 0}), NAMES)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(layout: str, reference: tuple[Path, dict[str, list[float]]]) -> None:
    folder, expected = reference
    number, batch, parallel = LAYOUTS[layout]
    for result in run_ranks(trained, 2, config_of(folder, batch, parallel), NAMES[:number]):
        for name in NAMES[:number]:
            np.testing.assert_allclose(result[name], expected[name], rtol=1e-5, err_msg=name)
    assert len({tuple(losses) for losses in expected.values()}) == len(NORMALIZATIONS)


def test_calibration_warns_where_the_batch_divides_by_its_masks(tmp_path: Path) -> None:
    for name, normalization in NORMALIZATIONS.items():
        config = small_config(tmp_path, diffusion={"t_sampler": "ppots", "normalization": name})
        assert any("masked tokens" in line for line in objective_of(config).warnings()) == normalization.counts_masked
