"""What runs leave: result.json in each one's folder, and study.json, which holds all of them and is all that tables and
pictures are made of."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.load import flatten
from megatron_mdm.study.runs import RESULT, Recipe, Study
from megatron_mdm.study.statistics import proportion_error

Record = dict[str, Any]
STUDY = "study.json"
FAILURE = "failure.json"
FORMAT = 1
_CURVES = {  # curve → its keys in metrics.jsonl
    "loss": ("mean_loss", "grad_norm"),
    "validation": ("validation_loss",),
    "efficiency": ("validation_efficiency", "validation_efficiency_without_refit", "validation_efficiency_of_uniform"),
}
_SUMMARY = (
    "steps",
    "tokens",
    "stopped_early",
    "best_validation_loss",
    "best_step",
    "variance_of_loss",
    "variance_of_loss_eq_23",
    "variance_of_estimator",
)
_POINTS = 64  # of a calibration's density


def write_done(recipe: Recipe, summary: Record, score: Record, evaluation_seconds: float) -> None:
    """Write result.json: from then on the run is done."""
    folder = recipe.folder
    metrics = _lines(folder / "metrics.jsonl")
    config = recipe.load()
    value = score.get(recipe.task.score)
    if not isinstance(value, int | float):
        raise UserError(
            f"task {recipe.point.task}: 'score' {recipe.task.score} is no figure that '{recipe.task.measure}' gives "
            f"({', '.join(key for key, found in score.items() if isinstance(found, float))})"
        )
    record = {
        "format": FORMAT,
        **recipe.point._asdict(),
        "digest": recipe.digest,
        "told": f"{recipe.task.score} {value * recipe.task.scale:.2f}",
        "score": float(value),
        "standard_error": _error(recipe.task.score, score),
        "num_questions": score.get("num_questions"),
        **{key: summary.get(key) for key in _SUMMARY},
        "rows_per_sample": config.diffusion.rows_per_sample,
        "seconds": {**_training_seconds(metrics, summary), "evaluation": evaluation_seconds},
        "curves": {name: _curve(metrics, keys) for name, keys in _CURVES.items()},
        "calibration": _calibration(folder / "calibration.json"),
        "config": dict(flatten(config.model_dump(mode="json"))),
    }
    write_json(folder / RESULT, record)
    (folder / FAILURE).unlink(missing_ok=True)


def write_failure(folder: Path, error: str) -> None:
    """Note why a run failed. The next start tries it again."""
    write_json(folder / FAILURE, {"error": " ".join(error.split()), "time": time.time()})


def failure(folder: Path, since: float) -> str:
    """Why a run has failed since a time (as time.time has it); empty: it has not."""
    try:
        found = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found["error"]) if found["time"] >= since else ""


def result(recipe: Recipe) -> Record | None:
    """A run's result, if it is done. Raises UserError where it was another run's."""
    path = recipe.folder / RESULT
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove the folder") from None
    if record.get("digest") != recipe.digest:
        raise UserError(
            f"{path}: was made with other settings than the study has now; name another 'folder', or remove "
            f"{recipe.folder} to have this run again"
        )
    return record


def run_seconds(record: Record) -> float:
    """Of training and calibration: what a budget of equal time counts."""
    return float(record["seconds"]["steps"] + record["seconds"]["calibration"])


def collect(study: Study, variance: Sequence[Record] = ()) -> Record:
    """Everything that is done: the content of study.json."""
    settings = study.settings
    listed = study.runs()
    runs = []
    failed = []
    for point, parts in listed:
        recipe = study.recipe(point)
        found = result(recipe)
        if found is not None:
            runs.append({**found, "parts": list(parts)})
        elif error := failure(recipe.folder, 0.0):
            failed.append({**point._asdict(), "error": error})
    return {
        "format": FORMAT,
        "settings": settings.model_dump(mode="json"),
        "num_asked": len(listed),
        "runs": runs,
        "failed": failed,
        "variance": list(variance),
    }


def read_collected(folder: Path) -> Record:
    """study.json of a folder. Raises UserError."""
    path = folder / STUDY
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run the study first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: of format {found.get('format')}, not {FORMAT}")
    return found


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _curve(metrics: Sequence[Record], keys: Sequence[str]) -> dict[str, list[Any]]:
    """step and the keys' values, of the records that have the first key."""
    chosen = [record for record in metrics if record.get(keys[0]) is not None]
    return {key: [record.get(key) for record in chosen] for key in ("step", *keys)}


def _training_seconds(metrics: Sequence[Record], summary: Record) -> dict[str, float]:
    """Seconds of all steps and of the calibration, each part of a run that was interrupted by its own clock.
    Validation, checkpoints and starting are left out."""
    timed = [record for record in metrics if record.get("time_step") is not None]
    seconds = 0.0
    last = 0
    for record in timed:
        seconds += (record["step"] - last) * record["time_step"]
        last = record["step"]
    steps = seconds * summary["steps"] / last if last else math.nan
    calibration = summary.get("calibration") or {}
    return {"steps": steps, "calibration": float(calibration.get("seconds", 0.0))}


def _error(name: str, score: Record) -> float | None:
    """The standard error of a score over questions: what the measure says, else that of a share; None where it is not
    known."""
    if score.get("standard_error") is not None:
        return float(score["standard_error"])
    number = score.get("num_questions") or score.get("num_images")
    return proportion_error(float(score[name]), int(number)) if number else None


def _calibration(path: Path) -> Record | None:
    """What Figure 2 shows: the measured points and the density that was sampled from."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    cells = found["cell_density"]
    width = max(1, len(cells) // _POINTS)
    means = [sum(cells[first : first + width]) / width for first in range(0, width * _POINTS, width)]
    kept = ("density", "efficiency", "efficiency_of_uniform", "uniform_floor", "forwards", "seconds", "points")
    return {**{key: found[key] for key in kept}, "sampled_density": means}
