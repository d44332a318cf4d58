"""Which of a run's checkpoints evaluation, generation and export take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.checkpoint.choice import AUTO, BEST, NEWEST, choose, located
from megatron_mdm.checkpoint.manifest import entry_of, write_manifest
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config
from tests.small import small_config


def run_folder(folder: Path, losses: dict[int, float | None], keep_best: bool = True, **best: Any) -> Path:
    """A run with a checkpoint of each step, validated where it has a loss; best: the run's own best validation."""
    config = small_config(folder, checkpoint={"keep_best": keep_best})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    for step, loss in losses.items():
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        state = {"train": best, **({} if loss is None else {"validation_loss": loss})}
        (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
        write_manifest(path, {"state.json": entry_of(path / "state.json")})
    return folder


def step_of(folder: Path, wish: str = AUTO) -> int:
    return int(choose(folder, wish).path.name.removeprefix("step-"))


LOSSES: dict[int, float | None] = {2: 1.5, 4: 1.2, 5: None, 6: 1.4}


def test_wishes(tmp_path: Path) -> None:
    run = run_folder(tmp_path, LOSSES)
    assert [step_of(run, wish) for wish in (AUTO, BEST, NEWEST, "5", "step-00000002")] == [4, 4, 6, 5, 2]
    assert str(choose(run)) == "step-00000004, the best by validation loss (1.2; newest: step-00000006)"
    for wish in ("3", "bset"):
        with pytest.raises(UserError, match=f"no checkpoint '{wish}'; best, newest, or a step of: 2, 4, 5, 6"):
            choose(run, wish)


def test_a_run_that_keeps_no_best_one_means_its_newest(tmp_path: Path) -> None:
    run = run_folder(tmp_path, LOSSES, keep_best=False)
    assert step_of(run) == 6
    assert step_of(run, BEST) == 4


def test_a_run_without_validation_means_its_newest(tmp_path: Path) -> None:
    run = run_folder(tmp_path, {1: None, 2: None})
    assert step_of(run) == 2
    with pytest.raises(UserError, match="no checkpoint has a validation loss"):
        choose(run, BEST)


def test_a_best_one_that_could_not_be_saved_is_told(tmp_path: Path) -> None:
    run = run_folder(tmp_path, LOSSES, best_validation=1.1, best_step=3)
    assert choose(run).reason.endswith("; a better one, 1.1 after step 3, was not saved")


def test_a_damaged_one_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path, LOSSES)
    state = run / "checkpoints/step-00000004/state.json"
    state.write_text(state.read_text().replace("1.2", "1.0"))
    assert step_of(run) == 6
    assert "step-00000004 is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no intact checkpoint \(step-00000004"):
        choose(run, "4")


def test_a_checkpoint_can_be_named_by_its_folder(tmp_path: Path) -> None:
    run = run_folder(tmp_path, LOSSES)
    assert located(run / "checkpoints" / "step-00000005") == (run, "step-00000005")
    assert located(run) == (run, AUTO)
    with pytest.raises(UserError, match="the run has no checkpoint yet"):
        choose(run_folder_without(tmp_path / "other"))


def run_folder_without(folder: Path) -> Path:
    folder.mkdir()
    return run_folder(folder, {})
