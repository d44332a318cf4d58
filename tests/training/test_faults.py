"""Runs with faulty batches: what is logged, what is dumped, how they end, and that they resume to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_mdm.config.load import load_config
from megatron_mdm.training.faults import robust_score
from tests.ranks import run_program_ranks, run_ranks
from tests.training.test_resume import losses, write_config

# launch/train.py, in which a rank's first micro-batch of a step gets faulty weights.
WRAPPER = """
import runpy
from megatron_mdm.training.source import SupervisedSource
noised_batch = SupervisedSource.noised_batch
def faulty(self, step):
    batch = noised_batch(self, step)
    if step + self.loader.first_batch == {step} - 1 and self.context.data_rank == {rank}:
        batch.weights[0].row.mul_(float("{factor}"))
    return batch
SupervisedSource.noised_batch = faulty
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_a_skipped_step_is_logged_and_resumes_to_the_last_bit(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"zero": 1}, "fp32")
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(step=4, rank=1, factor="nan"), encoding="utf-8")
    arguments = ["--config", str(config), "schedule.steps=8", "checkpoint.save_every=2", "checkpoint.keep_last=9"]
    result, _ = run_program_ranks(str(wrapper), arguments, 2)
    assert result.exit_code == 0, result.stderr
    assert "warning: step 4 was skipped: loss nan" in result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_steps"] == 1
    (fault,) = map(json.loads, (tmp_path / "run/faults.jsonl").read_text().splitlines())
    assert (fault["step"], fault["kind"], fault["in_a_row"]) == (4, "skipped", 1)
    records = losses(tmp_path / "run")
    assert [record["loss"] is None for record in records if "lr" in record] == [False] * 3 + [True] + [False] * 4
    assert all(record["variance_of_loss"] is not None for record in records if "lr" in record and record["step"] != 4)

    for name in ("step-00000006", "step-00000008"):
        shutil.rmtree(tmp_path / "run/checkpoints" / name)
    resumed, _ = run_program_ranks(str(wrapper), [*arguments, "--resume"], 2)
    assert resumed.exit_code == 0, resumed.stderr
    assert losses(tmp_path / "run") == records


def test_a_spike_is_logged_with_the_heaviest_samples(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"zero": 1}, "fp32")
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(step=23, rank=0, factor="1000"), encoding="utf-8")
    result = run_program_ranks(str(wrapper), ["--config", str(config), "schedule.steps=24"])[0]
    assert result.exit_code == 0, result.stderr
    assert "warning: step 23 has an unusual loss: loss " in result.stderr
    (fault,) = map(json.loads, (tmp_path / "run/faults.jsonl").read_text().splitlines())
    assert (fault["step"], fault["kind"]) == (23, "spike")
    assert fault["score"] > 8
    assert len(fault["sample_ids"]) == 8
    assert any("loss_spike_score" in record for record in losses(tmp_path / "run"))


def after_the_spike(folder: Path, step: int, first_batch: int) -> list[float]:
    """On a rank: losses of the steps after a checkpoint, with the batches from first_batch + step on."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.build import build_trainer
    from megatron_mdm.training.calibrate import load_artifact
    from megatron_mdm.training.inputs import resolve

    config, data = resolve(load_config(folder / "config.yaml"))
    context = initialize(config.parallel)
    engine = restored_engine(folder / f"checkpoints/step-{step:08d}", config, context, step)
    artifact = load_artifact(folder / "calibration.json")
    trainer = build_trainer(config, data, engine, artifact, context, first_batch)
    return [trainer.train_step(number).loss for number in range(step, step + 4)]


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [({"zero": 0}, "bf16"), ({"zero": 1}, "bf16"), ({"zero": 3}, "fp32"), ({"pipeline": 2}, "fp32")],
    ids=["zero0_bf16", "zero1_bf16", "zero3", "pp2"],
)
def test_a_spike_is_undone_and_its_batches_left_out(parallel: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, parallel, dtype)
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(step=23, rank=0, factor="1000"), encoding="utf-8")
    arguments = ["--config", str(config), "schedule.steps=24", "checkpoint.save_every=4", "checkpoint.keep_last=9"]
    arguments += ["faults.on_spike=rewind", "faults.max_rewinds=1"]
    result, _ = run_program_ranks(str(wrapper), arguments, 2)
    assert result.exit_code == 0, result.stderr
    assert "warning: step 23: back to step-00000020; batches 20 to 22 are left out" in result.stderr
    spike, back = map(json.loads, (tmp_path / "run/faults.jsonl").read_text().splitlines())
    assert (spike["kind"], back["kind"], back["to_step"], back["batches"]) == ("spike", "rewind", 20, [20, 22])
    records = losses(tmp_path / "run")
    assert [record["step"] for record in records if "lr" in record] == list(range(1, 25))
    expected = run_ranks(after_the_spike, 2, tmp_path / "run", 20, 3)[0]
    assert [record["loss"] for record in records if "lr" in record][20:] == expected

    shutil.rmtree(tmp_path / "run/checkpoints/step-00000024")
    resumed, _ = run_program_ranks(str(wrapper), [*arguments, "--resume"], 2)
    assert resumed.exit_code == 0, resumed.stderr
    assert losses(tmp_path / "run") == records
    assert len((tmp_path / "run/faults.jsonl").read_text().splitlines()) == 2


def test_a_spike_before_the_first_checkpoint_is_logged(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"zero": 1}, "fp32")
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(step=23, rank=0, factor="1000"), encoding="utf-8")
    (result,) = run_program_ranks(
        str(wrapper), ["--config", str(config), "schedule.steps=24", "faults.on_spike=rewind"]
    )
    assert result.exit_code == 0, result.stderr
    assert "step 23: no checkpoint yet to go back to; training goes on" in result.stderr
    assert [record["step"] for record in losses(tmp_path / "run") if "lr" in record] == list(range(1, 25))


def reproduce(folder: Path) -> dict[str, Any]:
    """On a rank: the dumped batch against the one made again from the configuration; the gradient norm that it gives
    the last weights."""
    from megatron_mdm.batch import ModelInputs
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.checkpoint.store import read_state
    from megatron_mdm.engine.inputs import loss_inputs
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.build import build_trainer
    from megatron_mdm.training.calibrate import load_artifact
    from megatron_mdm.training.inputs import resolve

    config, data = resolve(load_config(folder / "config.yaml"))
    context = initialize()
    (dump,) = (folder / "faults").iterdir()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    batch = json.loads((dump / "batch.json").read_text())
    updates = read_state(checkpoint)["train"]["step"] - read_state(checkpoint)["train"]["num_skipped"]
    engine = restored_engine(checkpoint, config, context, updates)
    trainer = build_trainer(config, data, engine, load_artifact(folder / "calibration.json"), context)
    _, noised, weights = trainer.source.noised_batch(batch["step"])
    micro_batches = [loss_inputs(*pair) for pair in zip(noised, weights)]
    dumped = load_file(dump / f"data-rank-{context.data_rank:03d}.safetensors")
    again = [
        ModelInputs.from_tensors(
            {name.removeprefix(f"{index}/"): tensor for name, tensor in dumped.items() if name.startswith(f"{index}/")}
        )
        for index in range(len(micro_batches))
    ]
    return {
        "same": all(same(x.as_tensors(), y.as_tensors()) for x, y in zip(micro_batches, again)),
        "norm": engine.train_batch(again, batch["lr"]).grad_norm,
        "ids": batch["sample_ids"],
        "expected_ids": trainer.source.loader.loader.sample_ids(batch["step"]).tolist(),
    }


def same(tensors: dict[str, Any], others: dict[str, Any]) -> bool:
    return tensors.keys() == others.keys() and all(bool((tensors[name] == others[name]).all()) for name in tensors)


def test_faults_in_a_row_stop_the_run_with_a_batch_that_reproduces_them(tmp_path: Path) -> None:
    """A learning rate of 10³⁰: after the first step, every loss overflows."""
    config = write_config(tmp_path, {"zero": 1}, "fp32")
    arguments = ["--config", str(config), "optimizer.lr=1e30", "schedule.warmup_steps=0"]
    result, other = run_program_ranks("launch/train.py", [*arguments, "faults.max_skipped_in_a_row=3"], 2)
    assert result.exit_code == other.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: step 4: loss or gradient was infinite or not a number in 3 steps in a row")
    assert str(tmp_path / "run/faults/step-00000004") in error
    found = run_ranks(reproduce, 2, tmp_path / "run")
    for rank in found:
        assert rank["same"]
        assert rank["ids"] == rank["expected_ids"]
        assert not np.isfinite(rank["norm"])  # the fault is there again


def test_spikes_are_judged_by_median_and_spread() -> None:
    generator = np.random.default_rng(0)
    before = list(2.0 + 0.1 * generator.standard_normal(100))
    assert robust_score(2.05, before[:10]) == 0.0  # too few to judge by
    # Median and MAD of 100 normal losses have standard errors of 0.13 and 0.12 σ: 10 σ are told to within 4 of them.
    assert robust_score(3.0, before) == pytest.approx(10.0, rel=0.5)
    assert robust_score(3.0, [*before[:60], *[50.0] * 30]) == pytest.approx(robust_score(3.0, before), rel=0.7)
    assert robust_score(1.0, before) < 0  # a fall is none
    assert robust_score(2.0, [2.0] * 30) == 0.0
