"""The section `objective`: names, an objective's own keys, objectives from outside the package."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import Field

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.schema import ObjectiveConfig, RunConfig
from megatron_mdm.config.sections.objective import ObjectiveOptions
from megatron_mdm.objectives import OBJECTIVES, check_run, objective_of
from megatron_mdm.objectives.masked import Masked
from megatron_mdm.training.inputs import resolve
from tests.small import small_config, write_ids


class Dropping(Masked):
    """An objective with a key of its own."""

    class Options(ObjectiveOptions):
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file, where OBJECTIVES has one more."""
    monkeypatch.setitem(OBJECTIVES, "dropping", Dropping)
    path = tmp_path / "base.yaml"
    path.write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    return path


def written(base: Path, section: str) -> RunConfig:
    path = base.parent / "mine.yaml"
    path.write_text(f"defaults: [base.yaml]\nobjective:\n{section}", encoding="utf-8")
    return load_config(path)


def test_an_objective_from_outside_reads_its_own_keys(base: Path) -> None:
    objective = objective_of(written(base, "  name: dropping\n  dropout: 2.5e-1\n"))
    assert isinstance(objective, Dropping)
    assert objective.options == Dropping.Options(name="dropping", dropout=0.25)
    by_override = load_config(base, ["objective.name=dropping", "objective.dropout=0"])
    assert objective_of(by_override).options == Dropping.Options(name="dropping", dropout=0.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("  name: dropping\n  dropout: 1.5\n", "line 4: 'objective.dropout': input should be less than 1, got 1.5"),
        (
            "  name: dropping\n  dropot: 0.5\n",
            "line 4: unknown key 'objective.dropot' (did you mean 'objective.dropout'?)",
        ),
        ("  dropout: 0.5\n", "line 3: unknown key 'objective.dropout' (known here: name)"),
        (
            "  name: droping\n",
            "line 3: 'objective.name': must be one of {known}, got 'droping'",
        ),
    ],
)
def test_mistakes_in_the_section_name_file_and_line(section: str, message: str, base: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_run(written(base, section), 1)
    expected = message.format(known=", ".join(OBJECTIVES))  # other tests add theirs
    assert str(caught.value) == f"{base.parent / 'mine.yaml'}, {expected}"


def test_mistakes_in_overrides_are_named(base: Path) -> None:
    for override in ("objective.dropout=x", "objective={name: dropping, dropout: x}"):
        with pytest.raises(UserError, match=r"'objective\.dropout': input should be a valid number") as caught:
            objective_of(load_config(base, ["objective.name=dropping", override]))
        assert str(caught.value).startswith(f"override '{override}': ")


def test_a_run_keeps_the_defaults_of_its_objective(base: Path) -> None:
    """Its config.yaml holds every key, however little was written."""
    write_ids(base.parent / "train.jsonl", 12)
    config, _ = resolve(load_config(base, ["objective.name=dropping"]))
    assert config.objective == ObjectiveConfig(name="dropping", dropout=0.1)
    base.write_text(dump_config(config), encoding="utf-8")
    assert load_config(base) == config
    assert load_config(base, ["objective.dropout=0.2"]) != config


def test_without_masks_there_is_no_density_to_calibrate(tmp_path: Path) -> None:
    objective = objective_of(small_config(tmp_path, objective={"name": "autoregressive"}))
    with pytest.raises(UserError, match=r"'objective\.name' autoregressive draws no masks"):
        _ = objective.design


def test_descriptions(tmp_path: Path, base: Path) -> None:
    """Labels tell apart what differs in more than its seed."""
    masked = objective_of(small_config(tmp_path)).description
    assert masked == ("standard", "uniform t, 1 view, strata none, bernoulli masks", True)
    diffusion = {"t_sampler": "ppots", "views": 2, "multisample": 3, "strata": 4}
    both = objective_of(small_config(tmp_path, diffusion=diffusion)).description
    assert both.label == "t_sampler ppots, views 2, multisample 3, strata 4"
    assert both.text == "ppots t, 2 views × 3, strata 4, bernoulli masks"
    own = objective_of(load_config(base, ["objective={name: dropping, dropout: 0.2}", "diffusion.views=2"])).description
    assert own.label == "name dropping, dropout 0.2, views 2"
    assert own.text == "name dropping, dropout 0.2, uniform t, 2 views, strata none, bernoulli masks"
    causal = objective_of(small_config(tmp_path, objective={"name": "autoregressive"})).description
    assert causal == ("autoregressive", "autoregressive", False)


def test_plans_know_the_mean_rate_of_the_schedule(tmp_path: Path) -> None:
    shares = {
        name: objective_of(small_config(tmp_path, diffusion={"mask_schedule": name})).scored_share
        for name in ("linear", "cosine")
    }
    assert shares == {"linear": 0.5, "cosine": pytest.approx(2 / math.pi, rel=1e-6)}


def test_adaptive_clipping_needs_the_schedule_of_validation(tmp_path: Path) -> None:
    diffusion = {"mask_schedule": "cosine", "t_sampler": "clipped", "clipping": {"bounds": "adaptive"}}
    config = small_config(tmp_path, diffusion=diffusion, evaluation={"every": 1}, data={"validation_fraction": 0.1})
    with pytest.raises(UserError, match=r"'diffusion\.mask_schedule' linear, not cosine; give two numbers"):
        check_run(config, 1)
