"""Every method of configs/methods trains; EMA changes no gradient; a re-fitted density survives a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.objectives import check_run, objective_of
from tests.ranks import run_program_ranks, run_ranks
from tests.small import small_config, write_ids
from tests.training.test_resume import losses as records_of

METHODS = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))
QUICK = {"num_samples": 3, "num_times": 10, "num_masks": 4, "num_restarts": 2, "initial_forwards": 60}
TOKEN = 7  # stands for a delimiter and for syntax, which the files name by texts


def config_of(folder: Path, diffusion: dict[str, Any], name: str, steps: int = 4) -> RunConfig:
    diffusion = json.loads(json.dumps(diffusion))
    if diffusion.get("t_sampler") == "ppots":
        diffusion["calibration"] = {**QUICK, **diffusion.get("calibration", {})}
    if "isad" in diffusion:
        diffusion["isad"]["delimiters"] = [TOKEN]
    if "syrm" in diffusion:
        diffusion["syrm"] = {"tokens": [TOKEN]}
    return small_config(
        folder,
        diffusion=diffusion,
        data={"validation_fraction": 0.2},
        evaluation={"every": 2, "num_samples": 4},
        schedule={"steps": steps},
        optimizer={"lr": 1e-3},
        checkpoint={"directory": str(folder / name)},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_ids(folder / "train.jsonl", 40)
    return folder


def trained(configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """On a rank: train every configuration; its records and a copy of one weight."""
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import inputs
    from megatron_mdm.training.folder import StartMode
    from megatron_mdm.training.run import train_run

    results = {}
    for name, config in configs.items():
        check_run(config, 1)
        config, data = inputs.resolve(config)
        summary = train_run(config, data, initialize(), StartMode())
        lines = (Path(config.checkpoint.directory) / "metrics.jsonl").read_text().splitlines()
        results[name] = {"summary": summary, "records": [json.loads(line) for line in lines]}
    return results


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {}
    for path in METHODS:
        diffusion = yaml.safe_load(path.read_text(encoding="utf-8"))["diffusion"]
        configs[path.stem] = config_of(folder, diffusion, path.stem)
    return run_ranks(trained, 1, configs)[0]


def losses(result: dict[str, Any]) -> list[float]:
    return [record["loss"] for record in result["records"] if "loss" in record]


@pytest.mark.parametrize("name", [path.stem for path in METHODS])
def test_every_method_trains(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name]["summary"]["steps"] == 4
    assert np.isfinite(losses(results[name])).all()
    assert results[name]["summary"]["best_validation_loss"] > 0.0


def test_ema_changes_no_gradient(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Losses, gradient norms and weights after training are the standard method's, bit for bit."""
    standard = results["standard"]["records"]
    ema = results["ema"]["records"]
    for ours, theirs in zip(ema, standard):
        if "loss" in ours:
            assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
            assert "adjusted_loss" in ours
    files = [sorted((folder / name / "checkpoints").rglob("*.safetensors")) for name in ("standard", "ema")]
    assert files[0]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_adaptive_clipping_chooses_an_interval(results: dict[str, dict[str, Any]]) -> None:
    chosen = [record for record in results["clipped_adaptive"]["records"] if "clipping_lower" in record]
    assert len(chosen) == 2
    assert all(0.0 < record["clipping_lower"] < record["clipping_upper"] <= 1.0 for record in chosen)


def refit_config(folder: Path, name: str) -> RunConfig:
    diffusion = {"t_sampler": "ppots", "views": 2, "calibration": {"refit_every": 2, "refit_half_life": 4}}
    config = config_of(folder, diffusion, name, steps=8)
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"save_every": 4})})


def test_refit_is_logged_and_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    config = refit_config(folder, "refit")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert run_program_ranks("launch/train.py", ["--config", str(path)], 2)[0].exit_code == 0
    records = records_of(folder / "refit")
    refits = [record for record in records if "refit_efficiency" in record]
    assert [record["step"] for record in refits] == [2, 4, 6, 8]
    for record in refits:
        assert record["refit_kl_divergence"] >= 0.0
        for key in ("refit_efficiency", "refit_efficiency_before", "refit_efficiency_without"):
            assert 0.0 < record[key] <= 1.0 + 1e-6
    assert refits[-1]["refit_efficiency_before"] != refits[-1]["refit_efficiency_without"]  # it has moved
    shutil.rmtree(folder / "refit" / "checkpoints" / "step-00000008")
    resumed = run_program_ranks("launch/train.py", ["--config", str(path), "--resume"], 2)[0]
    assert "at step 4" in resumed.stdout, resumed.stderr
    assert records_of(folder / "refit") == records


def test_combinations_that_cannot_or_should_not_be(folder: Path) -> None:
    both = config_of(folder, {"ema": {"enabled": True}, "strata": "full"}, "x")
    assert "the paper advises against" in objective_of(both).warnings()[0]
    assert objective_of(config_of(folder, {"ema": {"enabled": True}}, "x")).warnings() == []
    corpus = both.model_copy(update={"data": both.data.model_copy(update={"format": "corpus"})})
    syrm = corpus.model_copy(update={"diffusion": config_of(folder, {"syrm": {}}, "x").diffusion})
    with pytest.raises(UserError, match=r"'diffusion\.syrm' is for"):
        check_run(syrm, 1)
    with pytest.raises(UserError, match=r"needs 'diffusion\.t_sampler' ppots"):
        check_run(config_of(folder, {"calibration": {"refit_every": 5}}, "x"), 1)
    nested = {"estimator": "naive", "density": "epr", "num_samples": 3, "num_masks": 2}
    with pytest.raises(UserError, match="of 4 rows each here: raise 'num_samples' times 'num_masks' to 16"):
        check_run(config_of(folder, {"views": 2, "multisample": 2, "calibration": nested}, "x"), 1)
