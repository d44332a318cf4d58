"""Budgets of equal time: how many steps, and when it is settled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mdm.cli.configs import config_path
from megatron_mdm.config.errors import UserError
from megatron_mdm.study.pace import step_factor
from megatron_mdm.study.results import FAILURE, RESULT
from megatron_mdm.study.runs import Point, Study
from megatron_mdm.study.settings import read_study
from tests.study.small import write_study

PACED = Point("ids", "standard", 1, pace="mirror")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    parts = [
        {"name": "first", "methods": ["standard", "mirror"], "seeds": [1, 2, 3]},
        {"name": "rates", "methods": ["standard"], "seeds": [1], "lr_factors": [2.0]},
        {"name": "time", "budget": "time", "methods": ["standard"]},
    ]
    path = write_study(tmp_path, "study", reference="mirror", parts=parts)
    return Study(read_study(path), config_path)


def take(study: Study, point: Point, steps: float, calibration: float = 0.0) -> None:
    """A run's result, which took these seconds."""
    recipe = study.recipe(point)
    recipe.folder.mkdir(parents=True)
    seconds = {"steps": steps, "calibration": calibration, "evaluation": 50.0}
    (recipe.folder / RESULT).write_text(json.dumps({"digest": recipe.digest, "seconds": seconds}), encoding="utf-8")


def test_a_run_that_had_company_does_not_set_the_pace(study: Study) -> None:
    """By medians over seeds of training and calibration, at the configuration's rate; settled once."""
    take(study, Point("ids", "standard", 1), 10.0)
    assert step_factor(study, PACED, 0.0) is None
    take(study, Point("ids", "standard", 1, lr_factor=2.0), 90.0)
    for seed, seconds in ((1, 45.0), (2, 19.0), (3, 21.0)):
        take(study, Point("ids", "mirror", seed), seconds, calibration=2.0)
    assert step_factor(study, PACED, 0.0) == 2.3
    take(study, Point("ids", "standard", 2), 30.0)
    assert step_factor(study, PACED._replace(seed=2), 0.0) == 2.3
    assert step_factor(study, Point("ids", "standard", 1), 0.0) == 1.0


def test_a_run_whose_pace_has_failed_says_so(study: Study) -> None:
    folder = study.recipe(Point("ids", "mirror", 1)).folder
    folder.mkdir(parents=True)
    (folder / FAILURE).write_text(json.dumps({"error": "no memory", "time": 5.0}), encoding="utf-8")
    assert step_factor(study, PACED, 6.0) is None  # it failed before this start, and will be tried again
    with pytest.raises(UserError, match="needs the seconds of ids-mirror-1, which has failed: no memory"):
        step_factor(study, PACED, 4.0)
