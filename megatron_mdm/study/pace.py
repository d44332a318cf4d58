"""Budgets of equal time: as many steps as take the seconds of another method's run, by what both have taken here.

The number is settled once for a task and a method, by whichever process asks first, and kept in the study's folder, so
that every seed, and every run that is resumed, has the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.study.results import failure, result
from megatron_mdm.study.runs import Point, Study

PACE = "pace"


def step_factor(study: Study, point: Point, since: float) -> float | None:
    """Steps of a run, to those of its configuration. None where the runs that it is measured by are not done yet.
    Raises UserError where one of them has failed since."""
    if not point.pace:
        return 1.0
    path = study.folder / PACE / f"{point.task}-{point.method}-to-{point.pace}.json"
    if not path.exists():
        seconds = []
        for method in (point.pace, point.method):
            found = _seconds(study, Point(point.task, method, point.seed), since)
            if found is None:
                return None
            seconds.append(found)
        _settle(path, round(seconds[0] / seconds[1], 2))
    return float(json.loads(path.read_text(encoding="utf-8"))["step_factor"])


def _seconds(study: Study, point: Point, since: float) -> float | None:
    """Of training and calibration."""
    recipe = study.recipe(point)
    record = result(recipe)
    if record is not None:
        return float(record["seconds"]["steps"] + record["seconds"]["calibration"])
    if error := failure(recipe.folder, since):
        raise UserError(f"needs the seconds of {point.name}, which has failed: {error}")
    return None


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
