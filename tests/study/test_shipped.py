"""The studies that are shipped: their runs, and what the paper's takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.cli.configs import config_path
from megatron_mdm.config.errors import UserError
from megatron_mdm.study.cluster_plan import planned_rows
from megatron_mdm.study.gradients import gradient_recipes
from megatron_mdm.study.pool import own_share_first
from megatron_mdm.study.runs import Point, Study, check_recipes
from megatron_mdm.study.settings import read_study
from megatron_mdm.training.plan.cluster import read_cluster
from tests.study.small import write_study


def shipped(name: str) -> Study:
    return Study(read_study(config_path(f"study/{name}")), config_path)


@pytest.fixture(scope="module")
def small() -> Study:
    return shipped("small")


def test_every_run_of_the_small_study_has_a_configuration(small: Study) -> None:
    check_recipes(small)
    points = [run.point for run in small.runs()]
    assert len(set(points)) == len(points) == len({point.name for point in points})
    assert {point.seed for point in points if point.method == "mirror"} == {42, 731, 20231}
    assert len({point.seed for point in points if point.method == "ppots_mirror_paper"}) == 10


def test_equal_compute_is_twice_the_batch_in_as_many_steps(small: Study) -> None:
    """Of what has one row a sample; what has two is the run of equal samples."""
    parts = {run.point: set(run.parts) for run in small.runs()}
    assert {"paper", "compute"} <= parts[Point("tables", "mirror", 42)]
    twice = small.recipe(Point("tables", "standard", 42, batch_factor=2.0)).load()
    assert "compute" in parts[Point("tables", "standard", 42, batch_factor=2.0)]
    assert (twice.batch.global_size, twice.schedule.epochs) == (64, 10)
    assert twice.optimizer.lr == small.recipe(Point("tables", "standard", 42)).load().optimizer.lr


def test_methods_that_have_no_meaning_on_a_task_are_left_out(small: Study) -> None:
    assert {run.point.task for run in small.runs() if run.point.method == "syrm"} == {"tables"}
    assert "images" not in {run.point.task for run in small.runs() if run.point.method == "autoregressive"}
    base = small.recipe(Point("facts", "autoregressive", 42)).load().model.init_from
    assert base == "runs/study_base/autoregressive"


def test_gradients_do_not_depend_on_how_answers_are_decoded(small: Study) -> None:
    task = small.settings.tasks["arithmetic"].model_copy(update={"settings": ["gen_length=20"]})
    tasks = {**small.settings.tasks, "arithmetic": task}
    other = Study(small.settings.model_copy(update={"tasks": tasks}), config_path)
    assert [recipe.digest for recipe in gradient_recipes(other)] == [
        recipe.digest for recipe in gradient_recipes(small)
    ]
    run = Point("arithmetic", "standard", 42)
    assert other.recipe(run).digest != small.recipe(run).digest


def test_shards_begin_apart_and_have_all(small: Study) -> None:
    recipes = small.recipes()
    orders = [own_share_first(recipes, index, 3) for index in range(3)]
    assert len({order[0].name for order in orders}) == 3
    assert all({recipe.name for recipe in order} == {recipe.name for recipe in recipes} for order in orders)
    assert all(order[-1].point.pace for order in orders)  # which wait for others' seconds


def test_the_papers_study_costs_no_more_than_the_paper_says() -> None:
    """Ratios to Standard's time. The paper's own calibration, 15,750 forwards, is a larger share of a run without what
    else its authors' took; ours stops early."""
    study = shipped("paper_8b")
    rows = {(row.task, row.method): row for row in planned_rows(study, read_cluster("h100-80gb"))}
    calibration = study.recipe(Point("gsm8k", "recommended", 42)).load().diffusion.calibration
    assert (calibration.estimator, calibration.density, calibration.target) == (
        "token_moments",
        "token_moments",
        "gradient",
    )
    for method in ("mirror", "ppots_mirror_paper"):
        assert rows["gsm8k", method].ratio <= rows["gsm8k", method].published_ratio
    assert rows["gsm8k", "ppots"].least_ratio <= rows["gsm8k", "ppots_paper"].published_ratio
    assert rows["gsm8k", "ppots_paper"].published_ratio == pytest.approx(1.71 / 1.59)
    assert all(row.hours < row.published for row in rows.values() if row.published == row.published)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"name": "p", "methods": ["mirrors"]}]}, "method 'mirrors' is not among mirror, standard"),
        ({"parts": [{"name": "p", "methods": ["mirror"], "budget": "time"}]}, "needs 'reference'"),
        ({"methods": {"standard": {"base": "causal"}, "mirror": {}}}, "asks for base 'causal'"),
        ({"seed": 1}, "unknown key 'seed'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_study(write_study(tmp_path, "study", **changes))
