"""Many runs → mean, its interval, range and standard deviation over the seeds of each method; table and picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import flatten, load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.evaluation.intervals import Interval, mean_interval

# (title, file in the run's folder, key)
METRICS = (
    ("exact match", "evaluation.json", "exact_match"),
    ("accuracy", "multiple_choice.json", "accuracy"),
    ("perplexity", "perplexity.json", "perplexity"),
    ("CLIP score", "clip_score.json", "clip_score"),
    ("digit accuracy", "image_scores.json", "digit_accuracy"),
    ("best validation loss", "summary.json", "best_validation_loss"),
    ("variance of loss", "summary.json", "variance_of_loss"),
    ("variance of n · batch's loss", "summary.json", "variance_of_estimator"),
)
# What runs of one method may differ in.
_FREE = (
    "seed",
    "checkpoint.",
    "logging.",
    "parallel.",
    "deepspeed",
    "batch.micro_size",
    "diffusion.calibration.artifact",
)


@dataclass(frozen=True)
class Run:
    folder: Path
    config: RunConfig
    method: str  # runs of one method differ in their seeds only
    values: dict[str, float]  # by a metric's title, those that the folder has


@dataclass(frozen=True)
class Spread:
    """One metric over the seeds of one method."""

    method: str
    metric: str
    values: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> Interval:
        """The mean with its 95 % interval over runs (Student's t): wide, where they are few."""
        return mean_interval(self.values)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    @property
    def standard_deviation(self) -> float:
        """The standard deviation of the runs, n − 1 in the denominator; not a number for one run."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")


def read_runs(folders: Iterable[Path], method_of: Callable[[RunConfig], str]) -> list[Run]:
    """Finished runs; of a folder that is none itself, those right below it. Raises UserError where there are none."""
    runs: list[Run] = []
    for folder in folders:
        found = (
            [folder] if (folder / "config.yaml").is_file() else sorted(p.parent for p in folder.glob("*/config.yaml"))
        )
        if not found:
            raise UserError(f"{folder}: neither a run's folder nor a folder of runs (no config.yaml)")
        runs.extend(_read(path, method_of) for path in found)
    if not any(run.values for run in runs):
        raise UserError("none of these runs has finished (no summary.json, no evaluation.json)")
    return runs


def spreads(runs: Sequence[Run]) -> list[Spread]:
    """A Spread for each metric and method that has it: metrics in the order of METRICS, methods in that of the runs."""
    methods = list(dict.fromkeys(run.method for run in runs))
    result = []
    for metric, *_ in METRICS:
        for method in methods:
            values = [run.values[metric] for run in runs if run.method == method and metric in run.values]
            if values:
                result.append(Spread(method, metric, values))
    return result


def unequal_settings(runs: Sequence[Run]) -> list[str]:
    """A line for each method whose runs differ in more than seeds and layouts, with the settings and values."""
    lines = []
    for method in dict.fromkeys(run.method for run in runs):
        trees = [_settings(run.config) for run in runs if run.method == method]
        different = []
        for key in sorted(set().union(*trees)):
            values = {json.dumps(tree.get(key)) for tree in trees}
            if len(values) > 1 and not key.startswith(_FREE):
                different.append(f"{key} ({', '.join(sorted(values))})")
        if different:
            lines.append(f"{method}: runs differ in {', '.join(different)}")
    return lines


def _settings(config: RunConfig) -> dict[str, Any]:
    """By dotted key; what lies in the run's own folder, such as its tokenizer, by its place there."""
    own = f"{config.checkpoint.directory}/"
    tree = dict(flatten(config.model_dump(mode="json")))
    return {key: value.removeprefix(own) if isinstance(value, str) else value for key, value in tree.items()}


def table(found: Sequence[Spread]) -> str:
    """A line per method and metric, in columns."""
    rows = [("metric", "method", "runs", "mean", "95 % interval", "range", "standard deviation")]
    for spread in found:
        low, high = spread.range
        deviation = "–" if np.isnan(spread.standard_deviation) else f"{spread.standard_deviation:.4f}"
        span = f"{low:.4f} to {high:.4f}"
        around = f"± {spread.interval.half_width:.4f}" if len(spread.values) > 1 else "–"
        number = str(len(spread.values))
        rows.append((spread.metric, spread.method, number, f"{spread.mean:.4f}", around, span, deviation))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def as_json(runs: Sequence[Run], found: Sequence[Spread]) -> dict[str, Any]:
    return {
        "runs": [
            {"folder": str(run.folder), "method": run.method, "seed": run.config.seed, **run.values} for run in runs
        ],
        "spreads": [
            {
                "metric": spread.metric,
                "method": spread.method,
                "num_runs": len(spread.values),
                "mean": spread.mean,
                "interval": spread.interval[1:] if len(spread.values) > 1 else None,
                "range": list(spread.range),
                "standard_deviation": spread.standard_deviation if len(spread.values) > 1 else None,
            }
            for spread in found
        ],
    }


def spread_figure(found: Sequence[Spread]) -> Figure:
    """A panel per metric: every run a dot, the mean of each method a line."""
    metrics = list(dict.fromkeys(spread.metric for spread in found))
    methods = list(dict.fromkeys(spread.method for spread in found))
    figure = Figure(figsize=(4.0 * len(metrics), 1.2 + 0.5 * len(methods)))
    for panel, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(1, len(metrics), panel)
        for spread in found:
            if spread.metric == metric:
                place = methods.index(spread.method)
                axes.plot(spread.values, [place] * len(spread.values), "o", alpha=0.6)
                axes.plot([spread.mean] * 2, [place - 0.3, place + 0.3], color="black")
        axes.set(title=metric, ylim=(len(methods) - 0.5, -0.5))
        axes.set_yticks(range(len(methods)), methods if panel == 1 else [""] * len(methods))
        axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return figure


def _read(folder: Path, method_of: Callable[[RunConfig], str]) -> Run:
    values = {}
    for title, name, key in METRICS:
        path = folder / name
        if path.is_file():
            try:
                value = json.loads(path.read_text(encoding="utf-8")).get(key)
            except ValueError as error:
                raise UserError(f"{path}: not valid JSON ({error})") from None
            if isinstance(value, int | float) and np.isfinite(value):
                values[title] = float(value)
    config = load_config(folder / "config.yaml")
    return Run(folder, config, method_of(config), values)
