"""A study is done once, killed or not; what fails costs itself."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_mdm.cli.configs import config_path
from megatron_mdm.study.claims import claim
from megatron_mdm.study.pool import Machine, Pool
from megatron_mdm.study.runs import Study
from megatron_mdm.study.settings import read_study
from tests.ranks import ProgramRanks, run_program_ranks
from tests.study.small import reached, write_study

PROGRAM = "tools/study.py"
CLOCKED = ("variance_and_time", "runs")  # tables that have seconds


def tables(folder: Path) -> dict[str, str]:
    """All tables but those of seconds."""
    paths = sorted((folder / "tables").iterdir())
    return {path.name: path.read_text(encoding="utf-8") for path in paths if path.stem not in CLOCKED}


def terminate_all(pid: int) -> None:
    """SIGTERM to a process and all that descend from it, as Slurm and `timeout` send it."""
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            one.terminate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_study(folder, "study")
    (result,) = run_program_ranks(PROGRAM, [str(path), "--workers", "2"])
    assert result.exit_code == 0, result.stdout + result.stderr
    return folder / "study"


def test_every_run_is_done_and_told(whole: Path) -> None:
    runs = reached(whole)
    assert [(run["method"], run["seed"]) for run in runs] == [(m, s) for s in (1, 2) for m in ("standard", "mirror")]
    assert all(run["steps"] == 6 and run["curves"]["validation"]["step"] == [2, 4, 6] for run in runs)
    assert (whole / "pictures" / "scores.png").exists()
    assert not list(whole.glob("runs/*/checkpoints"))
    assert "| mirror |" in (whole / "tables.md").read_text(encoding="utf-8")


def test_stopped_and_killed_and_given_again_it_has_the_same_tables(whole: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, "study")
    folder = tmp_path / "study"
    program = ProgramRanks(PROGRAM, [str(path), "--workers", "2"])
    while program.is_running() and not list(folder.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.02)
    terminate_all(program.processes[0].pid)
    (result,) = program.wait()
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "stopped; the same command goes on" in result.stdout
    assert "FAILED" not in result.stdout
    program = ProgramRanks(PROGRAM, [str(path), "--workers", "2"])
    time.sleep(random.uniform(0.5, 3.0))
    program.kill()
    (result,) = run_program_ranks(PROGRAM, [str(path), "--workers", "2"])
    assert result.exit_code == 0, result.stdout + result.stderr
    assert tables(folder) == tables(whole)
    kept = ("score", "curves", "variance_of_loss", "best_validation_loss")
    assert [[run[key] for key in kept] for run in reached(folder)] == [
        [run[key] for key in kept] for run in reached(whole)
    ]


def test_a_run_that_fails_costs_itself_and_the_exit_code(whole: Path, tmp_path: Path) -> None:
    """What is done is not done again; strata of a batch that is smaller are refused."""
    methods = {"standard": {}, "mirror": {}, "strata": {"overrides": ["diffusion.strata=9"]}}
    parts = [{"name": "first", "methods": ["strata", "standard"]}]
    path = write_study(tmp_path, "study", methods=methods, parts=parts, seeds=[1])
    (result,) = run_program_ranks(PROGRAM, [str(path), "--workers", "1"])
    assert result.exit_code == 1
    assert "strata-1: FAILED: 'diffusion.strata' 9 exceeds" in result.stdout.replace("ids-", "")
    record = json.loads((tmp_path / "study" / "study.json").read_text(encoding="utf-8"))
    assert [run["method"] for run in record["runs"]] == ["standard"]
    assert [run["method"] for run in record["failed"]] == ["strata"]


def test_a_dry_run_tells_what_is_left(whole: Path, tmp_path: Path) -> None:
    done = whole.with_suffix(".yaml")
    fresh = write_study(tmp_path, "study")
    for path, line in ((done, "4 runs, 4 of them done; 2 at a time"), (fresh, "4 runs, 0 of them done; 2 at a time")):
        (result,) = run_program_ranks(PROGRAM, [str(path), "--dry-run", "--workers", "2"])
        assert result.exit_code == 0, result.stderr
        assert line in result.stdout
        assert "first: 4 runs" in result.stdout
    assert not (tmp_path / "study").exists()


def test_what_others_have_claimed_is_left_to_them(tmp_path: Path) -> None:
    study = Study(read_study(write_study(tmp_path, "study")), config_path)
    for recipe in study.recipes():
        assert claim(study.folder, recipe.name)
    outcome = Pool(study, study.recipes(), Machine(1, 1), print, patience=0.0).run()
    assert outcome.elsewhere == [recipe.name for recipe in study.recipes()]
    assert not outcome.done


def test_other_settings_in_the_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    text = whole.with_suffix(".yaml").read_text(encoding="utf-8").replace("num_repeats=2", "num_repeats=3")
    path.write_text(text, encoding="utf-8")
    (result,) = run_program_ranks(PROGRAM, [str(path), "--dry-run"])
    assert result.exit_code == 1
    assert "was made with other settings than the study has now" in result.stderr
