"""A run that is killed and resumed equals the run that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.load import dump_config
from megatron_mdm.training.metrics import is_measured
from tests.ranks import ProgramRanks, run_program_ranks
from tests.small import small_config, small_model, write_ids
from tests.training.test_layouts import METHOD

VARIANTS = {
    "zero0": ({"zero": 0}, "fp32"),
    "zero1_bf16": ({"zero": 1}, "bf16"),
    "zero2": ({"zero": 2}, "fp32"),
    "zero3": ({"zero": 3}, "fp32"),
    "tp2": ({"tensor": 2, "zero": 1}, "fp32"),
}


def losses(folder: Path) -> list[dict[str, Any]]:
    """The records of a run less what depends on the clock, and those that hold nothing else."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    records = [{key: value for key, value in record.items() if not is_measured(key)} for record in records]
    return [record for record in records if record.keys() != {"step"}]


def write_config(folder: Path, parallel: dict[str, Any], dtype: str) -> Path:
    config = small_config(
        folder,
        data={"validation": str(folder / "validation.jsonl")},
        diffusion=METHOD,
        parallel=parallel,
        precision={"dtype": dtype},
        schedule={"steps": 12, "warmup_steps": 2, "name": "cosine"},
        evaluation={"every": 3, "num_samples": 4, "num_times": 2},
    )
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    write_ids(folder / "train.jsonl", 30)
    write_ids(folder / "validation.jsonl", 6, seed=1)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_and_resumed_run_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, *VARIANTS[name])

    def arguments(run: str, *more: str) -> list[str]:
        return ["--config", str(config), f"checkpoint.directory={tmp_path / run}", "checkpoint.save_every=4", *more]

    whole = run_program_ranks("launch/train.py", arguments("whole"), 2)
    assert [rank.exit_code for rank in whole] == [0, 0], whole[0].stderr
    ranks = ProgramRanks("launch/train.py", arguments("killed"), 2)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    saved = tmp_path / "killed" / "checkpoints" / "step-00000004"
    while ranks.is_running() and not (
        saved.exists() and metrics.exists() and '"step": 6,' in metrics.read_text(encoding="utf-8")
    ):
        time.sleep(0.005)
    ranks.kill()
    assert saved.exists()
    assert not saved.with_name("step-00000012").exists(), "killed too late to show anything"

    resumed = run_program_ranks("launch/train.py", arguments("killed", "--resume"), 2)
    assert [rank.exit_code for rank in resumed] == [0, 0], resumed[0].stderr
    assert "resumed from" in resumed[0].stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed/calibration.json").exists()


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"zero": 1}, "fp32")
    arguments = ["--config", str(config), "checkpoint.save_every=4", "checkpoint.keep_last=3"]
    first = run_program_ranks("launch/train.py", arguments, 1)
    assert first[0].exit_code == 0, first[0].stderr
    before = losses(tmp_path / "run")
    state = next((tmp_path / "run/checkpoints/step-00000012").rglob("*.safetensors"))
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    state.write_bytes(damaged)
    resumed = run_program_ranks("launch/train.py", [*arguments, "--resume"], 1)
    assert resumed[0].exit_code == 0, resumed[0].stderr
    assert "step-00000012 is damaged" in resumed[0].stdout
    assert "resumed from" in resumed[0].stdout
    assert losses(tmp_path / "run") == before


def test_retention_and_a_second_run_in_the_same_folder(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"zero": 1}, "fp32")
    arguments = ["--config", str(config), "checkpoint.save_every=3", "checkpoint.keep_last=2"]
    assert run_program_ranks("launch/train.py", arguments)[0].exit_code == 0
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-00000009", "step-00000012"]
    again = run_program_ranks("launch/train.py", arguments)[0]
    assert again.exit_code == 1
    assert "holds a run already" in again.stderr
    before = losses(tmp_path / "run")
    results = [tmp_path / "run" / name for name in ("evaluation.json", "evaluation.own.json", "samples.none.jsonl")]
    for path in results:
        path.write_text("{}", encoding="utf-8")
    assert run_program_ranks("launch/train.py", [*arguments, "--overwrite"])[0].exit_code == 0
    assert not any(path.exists() for path in results)
    assert losses(tmp_path / "run") == before  # same seed, same losses


ANY_LAYOUT = {  # resumed on: (ranks, overrides)
    "dp2": (2, []),
    "tp2_dp2_zero3": (4, ["parallel.tensor=2", "parallel.zero=3"]),
    "pp4": (4, ["parallel.pipeline=4"]),
    "one_process_zero0": (1, ["parallel.zero=0", "batch.micro_size=8"]),
}


@pytest.fixture(scope="module")
def saved_at_tp2_pp2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps at tensor 2 × pipeline 2, with checkpoints at 5 and 10."""
    folder = tmp_path_factory.mktemp("reshard")
    write_ids(folder / "train.jsonl", 30)
    config = small_config(
        folder,
        model=small_model(num_layers=4).model_dump(),
        diffusion=METHOD,
        optimizer={"lr": 1e-3},
        schedule={"steps": 10, "warmup_steps": 2, "name": "cosine"},
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    arguments = ["parallel.tensor=2", "parallel.pipeline=2", "checkpoint.save_every=5"]
    results = run_program_ranks("launch/train.py", ["--config", str(folder / "config.yaml"), *arguments], 4)
    assert results[0].exit_code == 0, results[0].stderr
    return folder


@pytest.mark.parametrize("name", ANY_LAYOUT)
def test_resumes_on_any_layout(name: str, saved_at_tp2_pp2: Path, tmp_path: Path) -> None:
    num_ranks, overrides = ANY_LAYOUT[name]
    shutil.copytree(saved_at_tp2_pp2 / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")
    arguments = ["--config", str(saved_at_tp2_pp2 / "config.yaml"), "--resume", *overrides]
    arguments += [f"checkpoint.directory={tmp_path / 'run'}"]
    results = run_program_ranks("launch/train.py", arguments, num_ranks)
    assert results[0].exit_code == 0, results[0].stderr
    assert "at step 5" in results[0].stdout
    whole = losses(saved_at_tp2_pp2 / "run")
    resumed = losses(tmp_path / "run")
    assert [record["step"] for record in resumed] == list(range(1, 11))
    for record, expected in zip(resumed, whole):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_resumes_where_tensors_are_not_multiples_of_the_ranks(zero: int, tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 30)
    sections = {"batch": {"global_size": 6, "micro_size": 2}, "schedule": {"steps": 4}, "parallel": {"zero": zero}}
    (tmp_path / "config.yaml").write_text(dump_config(small_config(tmp_path, **sections)), encoding="utf-8")
    arguments = ["--config", str(tmp_path / "config.yaml"), "checkpoint.save_every=2"]
    assert run_program_ranks("launch/train.py", arguments, 3)[0].exit_code == 0
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    resumed = run_program_ranks("launch/train.py", [*arguments, "--resume"], 3)[0]
    assert resumed.exit_code == 0, resumed.stderr
    assert "at step 2" in resumed.stdout
    assert losses(tmp_path / "run") == before


def test_resuming_where_zero_cannot_run_is_refused(saved_at_tp2_pp2: Path) -> None:
    overrides = ["parallel.pipeline=2", "parallel.zero=3"]
    arguments = ["--config", str(saved_at_tp2_pp2 / "config.yaml"), "--resume", *overrides]
    (result,) = run_program_ranks("launch/train.py", arguments)
    assert result.exit_code == 1
    assert "use ZeRO 0 or 1" in result.stderr
