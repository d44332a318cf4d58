"""What a step reports and a log line says, recomputed from the step's losses; what a step does to the weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.control_variate import CONTROL_VARIATES, WeightedLosses
from megatron_mdm.diffusion.t_samplers import TabulatedSampler
from megatron_mdm.diffusion.variance import BatchMeans, OnlineVariance
from megatron_mdm.training.callbacks.base import Callback
from megatron_mdm.training.schedules import learning_rate
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

README = Path(__file__).parents[2] / "megatron_mdm" / "training" / "README.md"
NUM_STEPS = 9
EVERY = 3
DECAY = 0.5
DENSITY = TabulatedSampler.of(lambda t: 2.0 - t, 0.02)  # importance weights of 0.75 to 1.5
DIFFUSION = {"t_sampler": "ppots", "views": 2, "normalization": "token", "ema": {"enabled": True, "num_bins": 4}}


def config_of(folder: Path, **sections: Any) -> RunConfig:
    sections = {"diffusion": DIFFUSION, "optimizer": {"lr": 1e-3, "weight_decay": 0.0}, **sections}
    return small_config(
        folder,
        model=small_model(qkv_bias=True, qk_norm=True).model_dump(),
        schedule={"steps": NUM_STEPS, "warmup_steps": 4},
        logging={"every": EVERY, "tensorboard": False},
        **sections,
    )


class Recorder(Callback):
    """A callback that keeps every step's result."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def after_step(self, _: Any, result: Any) -> None:
        self.results.append(result)


def weights_of(engine: Any) -> dict[str, np.ndarray]:
    parts = (part for part in engine.optimizer_state.fragments() if part.kind == "weight")
    return {part.name: part.values.numpy().reshape(part.shape).copy() for part in parts}


def trained(config: RunConfig, decayed: RunConfig) -> dict[str, Any]:
    """On a rank: a run's records and results; weights before and after a first step, and after one with decay."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs
    from megatron_mdm.training.callbacks.log import Log
    from megatron_mdm.training.metrics import MetricsLog
    from megatron_mdm.training.speed import Speed
    from megatron_mdm.training.state import TrainState

    context = initialize()
    weights = {}
    artifact = {"cell_density": DENSITY.cell_density.tolist()}
    for name, one in (("decayed", decayed), ("plain", config)):
        one, data = inputs.resolve(one)
        trainer = build.build_trainer(one, data, restored_engine(None, one, context, 0), artifact, context)
        weights["before"] = weights_of(trainer.engine)
        micro_batches = _micro_batches(trainer)
        rows = trainer.engine.evaluate(micro_batches)
        result = trainer.train_step(0)
        weights[name] = weights_of(trainer.engine)
    state = TrainState(step=1)
    recorder = Recorder()
    folder = Path(config.checkpoint.directory)
    log = Log(trainer, MetricsLog(folder, False, True, 0), state, Speed(one.model, 1e12))
    for callback in (log, recorder):
        callback.after_step(state, result)
    trainer.train(state, [log, recorder])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    loader = trainer.source.loader.loader
    return {
        "records": [json.loads(line) for line in lines],
        "results": [vars(result) for result in recorder.results],
        "first_rows": np.concatenate([row.loss.double().numpy().reshape(2, -1) for row in rows], axis=1),
        "first_positions": np.concatenate([batch.positions.numpy() for batch in loader.batch(0).micro_batches]),
        "eligible": [loader.num_eligible[loader.sample_ids(step)] for step in range(9)],
        "weights": weights,
    }


def _micro_batches(trainer: Any) -> list[Any]:
    from megatron_mdm.engine.inputs import loss_inputs

    _, noised, weights = trainer.source.noised_batch(0)
    return [loss_inputs(*pair) for pair in zip(noised, weights)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("logged")
    write_ids(folder / "train.jsonl", 40)
    decayed = config_of(folder, optimizer={"lr": 1e-3, "weight_decay": DECAY}, checkpoint={"directory": str(folder)})
    found = run_ranks(trained, 1, config_of(folder), decayed)[0]
    found["results"] = [SimpleNamespace(**result) for result in found["results"]]
    return SimpleNamespace(**found)


def test_sample_losses_are_means_over_views(run: SimpleNamespace) -> None:
    """Measured before the step, forward only."""
    first = run.results[0]
    expected = np.empty(8)
    expected[run.first_positions] = run.first_rows.mean(0)
    np.testing.assert_allclose(first.sample_loss, expected, rtol=1e-5)


def test_the_loss_is_the_mean_of_its_terms(run: SimpleNamespace) -> None:
    """By 'token': the weighted loss times the sample's share of the batch's eligible tokens."""
    for result, count in zip(run.results, run.eligible, strict=True):
        term = result.weight * result.sample_loss * count / count.mean()
        np.testing.assert_allclose(result.term, term, rtol=1e-5)
        assert result.loss == pytest.approx(term.mean(), rel=1e-5)
        assert np.ptp(result.weight) > 0.1
        assert np.ptp(count) > 3


def test_variances_are_those_of_the_weighted_losses(run: SimpleNamespace) -> None:
    window = OnlineVariance()
    whole = OnlineVariance()
    assert [record["step"] for record in run.records] == [EVERY, 2 * EVERY, 3 * EVERY]
    for result in run.results:
        for online in (window, whole):
            online.update(result.weight, result.sample_loss, result.term)
        if (result.step + 1) % EVERY == 0:
            record = run.records[result.step // EVERY]
            for prefix, online in (("", window), ("run_", whole)):
                assert record[f"{prefix}variance_of_loss"] == pytest.approx(online.of_loss(), rel=1e-9)
                assert record[f"{prefix}variance_of_term"] == pytest.approx(online.of_term(), rel=1e-9)
                assert record[f"{prefix}variance_of_estimator"] == pytest.approx(online.of_estimator(), rel=1e-9)
            assert record["mean_loss"] == pytest.approx(window.mean(), rel=1e-9)
            window = window.next_window()


def test_the_adjusted_loss_knows_earlier_batches_only(run: SimpleNamespace) -> None:
    variate = CONTROL_VARIATES["centred"].new(4, 0.01)
    means = BatchMeans()
    window = BatchMeans()
    for result in run.results:
        batch = WeightedLosses(result.t, result.weight, result.term / result.weight, DENSITY.weighted_mass(4))
        for online in (means, window):
            online.add(float(variate.adjusted(batch).mean()))
        variate.update(batch)
        if (result.step + 1) % EVERY == 0:
            record = run.records[result.step // EVERY]
            assert record["adjusted_loss"] == pytest.approx(window.mean(), rel=1e-9)
            assert record["variance_of_adjusted_loss"] == pytest.approx(8 * window.variance(), rel=1e-9)
            assert record["run_variance_of_adjusted_loss"] == pytest.approx(8 * means.variance(), rel=1e-9)
            window = window.next_window()
    assert run.records[-1]["adjusted_loss"] != run.records[-1]["mean_loss"]


def test_every_figure_is_explained(run: SimpleNamespace) -> None:
    explained = README.read_text(encoding="utf-8")
    for key in run.records[0]:
        name = "time_…" if key.startswith("time_") else key.removeprefix("run_")
        assert f"`{name}`" in explained, key


def test_a_step_is_as_long_as_its_learning_rate(run: SimpleNamespace) -> None:
    """Adam's first step moves a weight whose gradient is not tiny by the rate: a quarter of the peak, in warm-up."""
    schedule = config_of(Path()).schedule
    rates = [learning_rate(step, NUM_STEPS, 1e-3, schedule) for step in range(NUM_STEPS)]
    assert [result.lr for result in run.results] == rates
    assert [record["lr"] for record in run.records] == rates[EVERY - 1 :: EVERY]
    before = run.weights["before"]
    after = run.weights["plain"]
    longest = max(float(np.abs(after[name] - before[name]).max()) for name in before)
    assert longest == pytest.approx(0.25e-3, rel=1e-3)


def test_matrices_are_decayed_and_vectors_are_not(run: SimpleNamespace) -> None:
    """AdamW: on top of the same step, a matrix loses rate · decay of itself; norms and biases nothing."""
    before, plain, decayed = (run.weights[name] for name in ("before", "plain", "decayed"))
    dimensions = {value.ndim for value in before.values()}
    assert dimensions == {1, 2}
    for name, value in before.items():
        lost = 0.25e-3 * DECAY * value if value.ndim == 2 else np.zeros_like(value)
        rounding = 4 * np.finfo(np.float32).eps * np.abs(value).max()
        np.testing.assert_allclose(plain[name] - decayed[name], lost, rtol=0, atol=rounding, err_msg=name)
