"""One model, any layout: the same t, masks and losses whatever the ranks, the sharding and the accumulation."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import RunConfig
from tests.ranks import run_ranks
from tests.small import small_config, write_ids

METHOD = {
    "sampler": "ppots",
    "views": 2,
    "strata": "full",
    "calibration": {"num_samples": 3, "num_times": 10, "num_masks": 4, "num_restarts": 3},
}

LAYOUTS = {  # name: (ranks, parallel section, micro-batch size)
    "dp2_zero0": (2, {"zero": 0}, 2),
    "dp2_zero1": (2, {"zero": 1}, 2),
    "dp2_zero2": (2, {"zero": 2}, 2),
    "dp2_zero3": (2, {"zero": 3}, 2),
    "dp2_no_accumulation": (2, {"zero": 1}, 4),
    "tp2_zero0": (2, {"tensor": 2, "zero": 0}, 4),
    "tp2_zero1": (2, {"tensor": 2, "zero": 1}, 4),
    "tp2_dp2_zero3": (4, {"tensor": 2, "zero": 3}, 2),
}


def train_and_watch(config: RunConfig) -> dict[str, Any]:
    """On a rank: 10 steps; losses, gradient norms, t, per-sample losses, a hash of every mask, the calibration."""
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import inputs, run
    from megatron_mdm.training.calibrate import calibrate

    config, data = inputs.resolve(config)
    context = initialize(config.parallel.tensor, config.parallel.pipeline)
    engine = run.ZeroEngine(run.build_model(config.model, context, config.seed), config, context)
    artifact = calibrate(engine, data.train, config.diffusion, data.special_ids, 4, config.seed, context)
    trainer = run.build_trainer(config, data, engine, artifact, context)
    masks: dict[tuple[int, int], str] = {}
    noiser = trainer.noiser

    def watched(batch, step):
        noised = noiser(batch, step)
        for row in range(len(batch.positions)):
            place = (step, int(batch.positions[row]))
            views = noised.masked.view(noised.views, len(batch.positions), -1)[:, row]
            shown = views[:, : int(batch.lengths[row])].numpy().tobytes()
            masks[place] = hashlib.sha256(shown).hexdigest()
        return noised

    watched.times, watched.views = noiser.times, noiser.views  # type: ignore[attr-defined]
    trainer = dataclasses.replace(trainer, noiser=watched)  # type: ignore[arg-type]
    steps = [trainer.train_step(step) for step in range(10)]
    return {
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "sample_losses": np.stack([step.sample_loss for step in steps]),
        "t": np.stack([step.t for step in steps]),
        "masks": masks,
        "calibration": artifact,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_ids(folder / "train.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    config = small_config(folder, diffusion=METHOD, parallel={"zero": 0}, batch={"global_size": 8, "micro_size": 8})
    return run_ranks(train_and_watch, 1, config)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, folder: Path, reference: dict[str, Any]) -> None:
    num_ranks, parallel, micro_size = LAYOUTS[name]
    config = small_config(
        folder, diffusion=METHOD, parallel=parallel, batch={"global_size": 8, "micro_size": micro_size}
    )
    results = run_ranks(train_and_watch, num_ranks, config)
    for result in results:
        np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["sample_losses"], reference["sample_losses"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result["grad_norms"], reference["grad_norms"], rtol=1e-4)
        assert result["calibration"]["cell_density"] == reference["calibration"]["cell_density"]
        np.testing.assert_array_equal(result["t"], reference["t"])
        assert all(reference["masks"][place] == mask for place, mask in result["masks"].items())
    seen = set().union(*(result["masks"].keys() for result in results))
    assert seen == reference["masks"].keys()


def test_losses_fall(reference: dict[str, Any]) -> None:
    assert np.mean(reference["losses"][-3:]) < np.mean(reference["losses"][:3])
