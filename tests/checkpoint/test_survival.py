"""Checkpoints and what storage does to them: damage, full disks, disks that turn read-only, retention."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mdm.checkpoint.store import SaveError, read_state, search, superfluous
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import CheckpointConfig
from tests.corruption import corrupt
from tests.ranks import run_program_ranks
from tests.small import small_config, small_model, write_ids


def config_file(folder: Path, directory: Path) -> Path:
    write_ids(folder / "train.jsonl", 30)
    config = small_config(
        folder,
        model=small_model(hidden_size=128, ffn_hidden_size=256).model_dump(),
        schedule={"steps": 6},
        checkpoint={"directory": str(directory), "save_every": 2},
    )
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def test_100_random_damages_are_detected(tmp_path: Path) -> None:
    config = config_file(tmp_path, tmp_path / "run")
    assert run_program_ranks("launch/train.py", ["--config", str(config)], 2)[0].exit_code == 0
    outcomes = corrupt(tmp_path / "run/checkpoints", cases=100, seed=0)
    assert {outcome.found for outcome in outcomes} == {"step-00000004"}
    assert all("step-00000006 is damaged (" in outcome.message for outcome in outcomes)
    files = {outcome.damage.split(" cut ")[0].split(" of ")[-1].split(" ")[0] for outcome in outcomes}
    assert {"manifest.json", "state.json"} < files


def test_a_file_that_the_manifest_lacks_is_damage(tmp_path: Path) -> None:
    config = config_file(tmp_path, tmp_path / "run")
    assert run_program_ranks("launch/train.py", ["--config", str(config)])[0].exit_code == 0
    stray = tmp_path / "run/checkpoints/step-00000006/tensors/stage-00.tensor-00-of-01.part-007.safetensors"
    stray.write_bytes(b"")
    assert search(tmp_path / "run/checkpoints")[0] == "step-00000004"


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk_costs_one_line_and_no_checkpoint(asynchronous: str, tmp_path: Path, small_disk: Path) -> None:
    config = config_file(tmp_path, small_disk / "run")
    arguments = ["--config", str(config), f"checkpoint.asynchronous={asynchronous}"]
    result, other = run_program_ranks("launch/train.py", arguments, 2)
    assert result.exit_code == other.exit_code == 1, result.stderr
    assert "error: step 4: " in result.stderr
    assert "cannot write a checkpoint (No space left on device); training goes on" in result.stderr
    assert "error: " in result.stderr.splitlines()[-1]
    assert "the run has trained to step 6" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr + other.stderr
    checkpoints = small_disk / "run/checkpoints"
    assert os.listdir(checkpoints) == ["step-00000002"]
    assert search(checkpoints) == ("step-00000002", "")

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = run_program_ranks("launch/train.py", ["--config", str(config), "--resume"], 2)[0]
    assert resumed.exit_code == 0, resumed.stderr
    assert "resumed from" in resumed.stdout


def fails_to_save(folder: Path) -> str:
    """On a rank: the store's error where the folder cannot be written."""
    from megatron_mdm.checkpoint.store import CheckpointStore
    from megatron_mdm.parallel.groups import initialize

    store = CheckpointStore(folder, CheckpointConfig(directory=""), initialize())
    store.save(
        2,
        SimpleNamespace(optimizer_state=SimpleNamespace(fragments=lambda: []), loss_scale=SimpleNamespace(state=dict)),
        {},
    )  # type: ignore[arg-type]
    with pytest.raises(SaveError) as caught:
        store.finish()
    return str(caught.value)


def test_read_only_disk_is_named_on_every_rank(tmp_path: Path, small_disk: Path) -> None:
    from tests.ranks import run_ranks

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    messages = run_ranks(fails_to_save, 2, small_disk / "checkpoints")
    expected = f"{small_disk / 'checkpoints'}: rank 0 cannot write a checkpoint (Read-only file system)"
    assert messages == [expected, expected]


def folders(folder: Path, losses: dict[int, float]) -> list[Path]:
    paths = []
    for step, loss in losses.items():
        path = folder / f"step-{step:08d}"
        path.mkdir()
        (path / "state.json").write_text(f'{{"validation_loss": {loss}}}' if loss else "{}", encoding="utf-8")
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, {4, 5}),
        ({"keep_last": 2}, {3, 4, 5}),
        ({"keep_last": 1, "keep_every": 2}, {2, 4, 5}),
        ({"keep_last": 1, "keep_best": True}, {1, 4, 5}),
    ],
    ids=str,
)
def test_retention(settings: dict[str, int], kept: set[int], tmp_path: Path) -> None:
    """Step 4 was just saved; step 5, of before the run was resumed, was damaged and counts for nothing."""
    paths = folders(tmp_path, {1: 2.0, 2: 3.0, 3: 2.5, 4: 0.0, 5: 0.0})
    removed = superfluous(tmp_path, paths[3], CheckpointConfig(directory="", **settings))
    assert {int(path.name[5:]) for path in paths if path not in removed} == kept


def test_without_validation_losses_there_is_no_best(tmp_path: Path) -> None:
    paths = folders(tmp_path, {1: 0.0, 2: 0.0, 3: 0.0})
    settings = CheckpointConfig(directory="", keep_last=1, keep_best=True)
    assert superfluous(tmp_path, paths[2], settings) == paths[:2]


def test_the_best_by_validation_loss_is_kept(tmp_path: Path) -> None:
    config = config_file(tmp_path, tmp_path / "run")
    arguments = ["--config", str(config), "data.validation_fraction=0.2", "evaluation.every=2"]
    arguments += ["checkpoint.keep_last=1", "checkpoint.keep_best=true", "optimizer.lr=0.5", "schedule.name=constant"]
    result = run_program_ranks("launch/train.py", arguments)[0]
    assert result.exit_code == 0, result.stderr
    names = os.listdir(tmp_path / "run/checkpoints")
    found = {name: read_state(tmp_path / "run/checkpoints" / name)["validation_loss"] for name in names}
    state = read_state(tmp_path / "run/checkpoints/step-00000006")["train"]
    assert min(found.values()) == state["best_validation"]
    assert len(found) <= 2
