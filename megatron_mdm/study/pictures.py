"""The study's pictures: scores, loss curves with bands, learning rates, efficiency under drift, calibration, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mdm.evaluation.intervals import mean_interval
from megatron_mdm.study.scores import BUDGETS, Scores
from megatron_mdm.study.verdicts import rankings

_WIDTH = 4.6  # inches of a panel
_COLORS = ("C0", "C1", "C2")  # by budget
_MOST_CURVES = 6  # of methods in one panel

Record = dict[str, Any]


def all_pictures(scores: Scores) -> dict[str, Figure]:
    """By name, those that there is something to show of."""
    found = {name: draw(scores) for name, draw in PICTURES.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def _scores(scores: Scores) -> Figure | None:
    """Every run a dot; the mean with Student's interval, where there are runs enough; a row for each method."""

    def panel(axes: Axes, task: str) -> bool:
        budgets = [budget for budget in BUDGETS if any(scores.scores(task, m, budget) for m in scores.methods(budget))]
        methods = [m for m in scores.settings.methods if any(scores.scores(task, m, budget) for budget in budgets)]
        shown: list[float] = []
        for index, budget in enumerate(budgets):
            axes.plot([], [], "o", color=_COLORS[index], markersize=3, label=BUDGETS[budget])
            for place, method in enumerate(methods):
                values = scores.scores(task, method, budget)
                shown += values
                _dots(axes, values, place + 0.25 * (index - 1), _COLORS[index])
        if shown:
            margin = 0.05 * (max(shown) - min(shown)) or 1.0
            axes.set_xlim(min(shown) - margin, max(shown) + margin)  # intervals of few runs may leave the panel
        axes.set_yticks(range(len(methods)), [scores.title(method) for method in methods], fontsize=8)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlabel("score; lines: Student's 95 % intervals of the means", fontsize=8)
        return bool(methods)

    return _panels(scores, panel, height=1.2 + 0.22 * len(scores.settings.methods))


def _dots(axes: Axes, values: Sequence[float], height: float, color: str) -> None:
    if not values:
        return
    axes.plot(values, [height] * len(values), "o", color=color, alpha=0.5, markersize=3)
    mean = mean_interval(values)
    axes.plot(mean.estimate, height, "|", color=color, markersize=9)
    if np.isfinite(mean.lower):
        axes.plot(mean[1:], [height] * 2, color=color, linewidth=1)


def _losses(scores: Scores) -> Figure | None:
    """Validation losses: means over seeds in bands from the least to the greatest (the paper's Figure 4)."""

    def panel(axes: Axes, task: str) -> bool:
        names = scores.settings.claims
        wanted = (names.standard, names.ppots, names.mirror, names.both, *names.ours)
        drawn = False
        for method in tuple(dict.fromkeys(wanted))[:_MOST_CURVES]:
            drawn |= _band(
                axes, scores.chosen(task=task, method=method), "validation", "validation_loss", scores.title(method)
            )
        axes.set(xlabel="step", ylabel="validation loss")
        return drawn

    return _panels(scores, panel)


def _rates(scores: Scores) -> Figure | None:
    factors = sorted({run["lr_factor"] for run in scores.runs})

    def panel(axes: Axes, task: str) -> bool:
        drawn = False
        for method in scores.methods("samples"):
            values = {factor: scores.scores(task, method, lr_factor=factor) for factor in factors}
            there = [factor for factor in factors if values[factor]]
            if len(there) > 1:
                axes.plot(there, [np.mean(values[f]) for f in there], "o-", markersize=3, label=scores.title(method))
                drawn = True
        axes.set_xscale("log", base=2)
        axes.set(xlabel="learning rate, to the configuration's", ylabel="score")
        return drawn

    return _panels(scores, panel)


def _drift(scores: Scores) -> Figure | None:
    """Efficiency of p(t) at validations (the paper's Figure 6)."""

    def panel(axes: Axes, task: str) -> bool:
        drawn = False
        for method in scores.methods("samples"):
            runs = scores.chosen(task=task, method=method)
            drawn |= _band(axes, runs, "efficiency", "validation_efficiency", scores.title(method))
        axes.set(xlabel="step", ylabel="efficiency of p(t)")
        return drawn

    return _panels(scores, panel)


def _calibrations(scores: Scores) -> Figure | None:
    """Measured points and the densities that are sampled, of the first seed (the paper's Figure 2)."""

    def panel(axes: Axes, task: str) -> bool:
        drawn = False
        for method in scores.methods("samples"):
            runs = [run for run in scores.chosen(task=task, method=method) if run["calibration"]]
            if not runs:
                continue
            found = runs[0]["calibration"]
            density = found["sampled_density"]
            t = (np.arange(len(density)) + 0.5) / len(density)
            (line,) = axes.plot(t, density, linewidth=1, label=f"{scores.title(method)} ({found['density']})")
            if method in (scores.settings.claims.ppots, scores.settings.claims.curve):
                points = found["points"]
                axes.plot(points["t"], points["optimal_density"], ".", markersize=3, color=line.get_color())
            drawn = True
        axes.set(xlabel="mask rate t", ylabel="density p(t)")
        axes.set_ylim(0, 4)
        return drawn

    return _panels(scores, panel)


def _ranks(scores: Scores) -> Figure | None:
    found = {ranking.task: ranking for ranking in rankings(scores)}

    def panel(axes: Axes, task: str) -> bool:
        if task not in found:
            return False
        ranking = found[task]
        axes.plot(ranking.variance, ranking.score, "o", markersize=4)
        for method, variance, score in zip(ranking.methods, ranking.variance, ranking.score):
            axes.annotate(scores.title(method), (variance, score), fontsize=6)
        correlation = ranking.correlation
        text = f"rank correlation {correlation.estimate:.2f} ({correlation.lower:.2f} to {correlation.upper:.2f})"
        axes.set(xlabel=f"gradient variance at equal compute; {text}", ylabel=f"score at {BUDGETS[ranking.budget]}")
        axes.xaxis.label.set_fontsize(7)
        return True

    return _panels(scores, panel, legend=False)


PICTURES: dict[str, Callable[[Scores], Figure | None]] = {
    "scores": _scores,
    "losses": _losses,
    "learning_rates": _rates,
    "drift": _drift,
    "calibrations": _calibrations,
    "variance_ranks": _ranks,
}


def _panels(
    scores: Scores, draw: Callable[[Axes, str], bool], height: float = 3.4, legend: bool = True
) -> Figure | None:
    """A panel for each task that has something to show, two in a row; None where none has. draw: whether it did."""
    tasks = [task for task in scores.tasks if draw(Figure().add_subplot(), task)]
    if not tasks:
        return None
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(_WIDTH * columns, height * rows))
    for number, task in enumerate(tasks, 1):
        axes = figure.add_subplot(rows, columns, number)
        draw(axes, task)
        axes.set_title(scores.task_title(task), fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        if legend:
            axes.legend(fontsize=6)
    figure.tight_layout()
    return figure


def _band(axes: Axes, runs: Sequence[Record], curve: str, key: str, label: str) -> bool:
    """The mean over runs, in a band from the least to the greatest, at the steps that all of them have."""
    curves = [dict(zip(run["curves"][curve]["step"], run["curves"][curve][key])) for run in runs]
    curves = [found for found in curves if found]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return False
    values = np.array([[found[step] for step in steps] for found in curves], dtype=float)
    (line,) = axes.plot(steps, values.mean(0), linewidth=1, label=label)
    axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
    return True
