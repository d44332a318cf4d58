"""Budgets of equal time: as many steps as take the seconds of another method's runs, by what both have taken here.

The number is settled once for a task and a method, by whichever process asks first, and kept in the study's folder, so
that every seed, and every run that is resumed, has the same.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.study.results import failure, result, run_seconds
from megatron_mdm.study.runs import Point, Recipe, Study

PACE = "pace"


def step_factor(study: Study, point: Point, since: float) -> float | None:
    """Steps of a run, to those of its configuration. None where the runs that it is measured by are not done yet.
    Raises UserError where one of them has failed since."""
    if not point.pace:
        return 1.0
    path = study.folder / PACE / f"{point.task}-{point.method}-to-{point.pace}.json"
    if not path.exists():
        methods = (point.pace, point.method)
        if not all(_is_done(study.recipe(Point(point.task, method, point.seed)), since) for method in methods):
            return None
        reference, own = (_median_seconds(study, point.task, method) for method in methods)
        _settle(path, round(reference / own, 2))
    return float(json.loads(path.read_text(encoding="utf-8"))["step_factor"])


def _is_done(recipe: Recipe, since: float) -> bool:
    if result(recipe) is not None:
        return True
    if error := failure(recipe.folder, since):
        raise UserError(f"needs the seconds of {recipe.name}, which has failed: {error}")
    return False


def _median_seconds(study: Study, task: str, method: str) -> float:
    """Of training and calibration, over the seeds that are done: one run may have had other programs beside it."""
    points = (run.point for run in study.runs() if run.point == Point(task, method, run.point.seed))
    records = (result(study.recipe(point)) for point in points)
    return statistics.median(run_seconds(record) for record in records if record is not None)


def _settle(path: Path, factor: float) -> None:
    """The first of several that do so has its way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"step_factor": factor}) + "\n", encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
