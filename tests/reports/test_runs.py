"""Many runs put together: spread over seeds, and what makes runs incomparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.objectives import objective_of
from megatron_mdm.reports.runs import read_runs, spreads, table, unequal_settings
from tests.ranks import run_program_ranks
from tests.small import small_config


def method_of(config: RunConfig) -> str:
    return objective_of(config).description.label


def write_run(folder: Path, exact_match: float, **sections: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(small_config(folder.parent, **sections)), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps({"exact_match": exact_match}))
    summary = {"best_validation_loss": None, "variance_of_loss": 2.0 * exact_match}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, score in ((1, 0.5), (2, 0.7), (3, 0.6)):
        write_run(tmp_path / f"standard_{seed}", score, seed=seed)
    for seed, score in ((1, 0.8), (2, 0.8)):
        write_run(tmp_path / f"ppots_{seed}", score, seed=seed, diffusion={"t_sampler": "ppots", "views": 2})
    write_run(tmp_path / "autoregressive", 0.9, objective={"name": "autoregressive"})
    return tmp_path


def test_spread_over_seeds(folder: Path) -> None:
    found = {(spread.metric, spread.method): spread for spread in spreads(read_runs([folder], method_of))}
    standard = found["exact match", "standard"]
    assert sorted(standard.values) == [0.5, 0.6, 0.7]
    assert standard.mean == pytest.approx(0.6)
    assert standard.range == (0.5, 0.7)
    assert standard.standard_deviation == pytest.approx(0.1)
    assert standard.interval.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert found["exact match", "t_sampler ppots, views 2"].standard_deviation == pytest.approx(0.0)
    assert found["exact match", "autoregressive"].values == [0.9]
    assert found["variance of loss", "standard"].mean == pytest.approx(1.2)
    assert ("best validation loss", "standard") not in found  # null in every summary


def test_the_program(folder: Path) -> None:
    output = folder / "report"
    result = run_program_ranks("tools/report.py", ["runs", str(folder), "--output", str(output)])[0]
    assert result.exit_code == 0, result.stderr
    assert table(spreads(read_runs([folder], method_of))) in result.stdout
    assert output.with_suffix(".png").stat().st_size > 0
    assert len(json.loads(output.with_suffix(".json").read_text())["runs"]) == 6


def test_runs_that_differ_in_more_than_their_seeds_are_named(folder: Path) -> None:
    assert unequal_settings(read_runs([folder], method_of)) == []
    write_run(folder / "standard_4", 0.1, seed=4, optimizer={"lr": 0.5})
    (line,) = unequal_settings(read_runs([folder], method_of))
    assert line == "standard: runs differ in optimizer.lr (0.003, 0.5)"


def test_a_tokenizer_in_each_runs_own_folder_is_no_difference(tmp_path: Path) -> None:
    for seed in (1, 2):
        run = str(tmp_path / f"run_{seed}")
        tokenizer = {"tokenizer": f"{run}/tokenizer/tokenizer.model"}
        write_run(Path(run), 0.5, seed=seed, checkpoint={"directory": run}, data=tokenizer)
    assert unequal_settings(read_runs([tmp_path], method_of)) == []
    other = {"directory": str(tmp_path / "run_3")}
    write_run(tmp_path / "run_3", 0.5, seed=3, checkpoint=other, data={"tokenizer": "other.model"})
    (line,) = unequal_settings(read_runs([tmp_path], method_of))
    assert "data.tokenizer" in line


def test_folders_without_runs(folder: Path) -> None:
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="neither a run's folder nor a folder of runs"):
        read_runs([empty], method_of)
    (empty / "config.yaml").write_text((folder / "standard_1" / "config.yaml").read_text())
    with pytest.raises(UserError, match="none of these runs has finished"):
        read_runs([empty], method_of)
