"""Gradients of single samples on every layout, and the choice that calibration makes by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.calibrator import FLOORS
from megatron_mdm.diffusion.gradient_floor import DRAWN_FROM, UNIFORM, harmless_floor
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, UniformSampler
from tests.ranks import run_ranks
from tests.small import small_config, write_ids

NUM_DRAWS = 5
LAYOUTS: list[dict[str, Any]] = [
    {"zero": 1},
    {"zero": 3},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
]


def drawn_between_steps(config: RunConfig) -> dict[str, Any]:
    """On a rank: gradients drawn after two steps of training, and the losses of two more steps; those of a run that
    drew none; and the squared norms by torch's own backward pass, where there is one process."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs
    from megatron_mdm.training.gradient_draws import draw_gradients

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    losses = []
    draws = None
    for wanted in (True, False):
        engine = restored_engine(None, config, context, 0)
        trainer = build.build_trainer(config, data, engine, None, context)
        losses.append([trainer.train_step(step).loss for step in range(2)])
        if wanted:
            draws = draw_gradients(engine, config, data, context, UniformSampler(), NUM_DRAWS)
        losses[-1] += [trainer.train_step(step).loss for step in range(2, 5)]
    assert draws is not None
    return {"t": draws.t, "squares": draws.squares, "losses": losses}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("draws")
    write_ids(folder / "train.jsonl", 20)
    return lambda parallel: small_config(folder, parallel=parallel, diffusion={"views": 2})


@pytest.fixture(scope="module")
def one_process(config_of: Any) -> dict[str, Any]:
    return run_ranks(drawn_between_steps, 1, config_of({"zero": 0}))[0]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_layouts_draw_the_same_and_training_goes_on_undisturbed(
    parallel: dict[str, Any], config_of: Any, one_process: dict[str, Any]
) -> None:
    for rank in run_ranks(drawn_between_steps, 2, config_of(parallel)):
        assert np.array_equal(rank["t"], one_process["t"])
        np.testing.assert_allclose(rank["squares"], one_process["squares"], rtol=1e-4)
        assert rank["losses"][0] == rank["losses"][1]


def test_one_process_is_undisturbed_and_draws_strata(one_process: dict[str, Any]) -> None:
    assert one_process["losses"][0] == one_process["losses"][1]
    assert np.sort(one_process["t"]) == pytest.approx((np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS)
    assert len(set(one_process["squares"])) == NUM_DRAWS


def sampler_of(floor: float) -> TabulatedSampler:
    return TabulatedSampler.of(lambda t: 1.0 / np.sqrt(t + 1e-3), floor)


def chosen(second_moment: Any, num_draws: int, seed: int) -> tuple[float, float]:
    """(floor, its true ratio of second moments), for ‖G‖² = E[‖G‖² | t] · an exponential number."""
    generator = np.random.default_rng(seed)
    t, weight = sampler_of(DRAWN_FROM).quantile((generator.permutation(num_draws) + 0.5) / num_draws)
    squares = second_moment(t) * generator.exponential(1.0, num_draws)
    found = harmless_floor(t, weight, squares, FLOORS, sampler_of)
    grid = (np.arange(20_000) + 0.5) / 20_000
    values = second_moment(grid)
    return found.floor, float((values / sampler_of(found.floor).density(grid)).mean() / values.mean())


def test_a_harmful_density_is_left_and_a_good_one_kept() -> None:
    harmful = [chosen(lambda t: 0.1 + t**2, 64, seed) for seed in range(100)]
    assert np.mean([floor == UNIFORM for floor, _ in harmful]) >= 0.95
    good = [chosen(lambda t: 1.0 / (t + 0.02), 64, seed) for seed in range(100)]
    assert np.mean([ratio for _, ratio in good]) < 0.85
    assert max(ratio for _, ratio in good) <= 1.0


def test_draws_that_are_not_finite_or_all_zero_decide_nothing() -> None:
    t = np.array([0.25, 0.5, 0.75])
    for squares in (np.array([np.inf, np.nan, 1.0]), np.zeros(3)):
        assert harmless_floor(t, np.ones(3), squares, FLOORS, sampler_of)[:3] == (UNIFORM, 1.0, 1.0)


def calibrated(config: RunConfig) -> dict[str, Any]:
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import inputs
    from megatron_mdm.training.calibrate import calibrate

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    artifact = calibrate(restored_engine(None, config, context, 0), config, data, context)
    return {key: artifact[key] for key in ("gradients", "uniform_floor", "cell_density")}


def test_calibration_for_the_gradient_is_judged_by_gradients(tmp_path: Path) -> None:
    """On a pipeline as on one process; the floor that they choose is that of the density that training samples."""
    write_ids(tmp_path / "train.jsonl", 20)
    calibration = {"target": "gradient", "num_gradients": 16, "num_times": 8, "num_masks": 2, "initial_forwards": 32}
    diffusion = {"t_sampler": "ppots", "calibration": calibration}
    results = [
        run_ranks(calibrated, ranks, small_config(tmp_path, parallel=parallel, diffusion=diffusion))[0]
        for ranks, parallel in ((1, {"zero": 0}), (2, {"pipeline": 2}))
    ]
    assert results[0]["cell_density"] == results[1]["cell_density"]
    assert results[0]["gradients"] == results[1]["gradients"]
    assert results[0]["gradients"]["floor"] == results[0]["uniform_floor"]
    assert results[0]["gradients"]["num_gradients"] == 16
    if results[0]["uniform_floor"] == UNIFORM:
        assert set(results[0]["cell_density"]) == {1.0}
