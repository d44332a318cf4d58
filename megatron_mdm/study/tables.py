"""The study's tables, and their forms: Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_mdm.evaluation.intervals import Interval, mean_interval
from megatron_mdm.study.results import run_seconds
from megatron_mdm.study.scores import BUDGETS, Scores
from megatron_mdm.study.verdicts import rankings, verdicts

NONE = "–"
_OF_RUNS = (
    "task",
    "method",
    "seed",
    "lr_factor",
    "batch_factor",
    "pace",
    "steps",
    "score",
    "standard_error",
    "best_validation_loss",
)
_SECONDS = ("steps", "calibration", "evaluation")  # that a run is timed by


class Table(NamedTuple):
    name: str  # of its files
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def all_tables(scores: Scores) -> list[Table]:
    """Those that have rows."""
    tables = [*(score_table(scores, budget) for budget in BUDGETS), every_score(scores)]
    tables += [*(loss_table(scores, budget) for budget in BUDGETS), variance_table(scores), rate_table(scores)]
    tables += [claim_table(scores), ranking_table(scores), failed_table(scores)]
    return [table for table in tables if table.rows]


def score_table(scores: Scores, budget: str) -> Table:
    """The paper's Table 1: methods by tasks."""
    note = "Mean (worst to best seed) ± half of Student's 95 % interval of the mean; [n]: runs."
    return _by_method(scores, budget, ("scores", "Scores"), lambda *of: _score_cell(scores.scores(*of)), note)


def loss_table(scores: Scores, budget: str) -> Table:
    """Validation losses, whose seeds differ less than answers do. Of autoregressive runs it is another loss."""
    note = "Best validation loss of a run, mean ± half of Student's 95 % interval; [n]: runs."
    return _by_method(scores, budget, ("losses", "Validation losses"), lambda *of: _loss_cell(scores.losses(*of)), note)


def _by_method(
    scores: Scores, budget: str, names: tuple[str, str], cell: Callable[[str, str, str], str], note: str
) -> Table:
    """A row for each method, a column for each task. names: of files, and of the title."""
    rows = []
    for method in scores.methods(budget):
        cells = [cell(task, method, budget) for task in scores.tasks]
        if any(found != NONE for found in cells):
            rows.append((scores.title(method), *cells))
    header = ("method", *map(scores.task_title, scores.tasks))
    return Table(f"{names[0]}_{budget}", f"{names[1]} at {BUDGETS[budget]}", header, rows, note)


def every_score(scores: Scores) -> Table:
    """In numbers, a row for each task, method and budget."""
    rows = []
    for budget in BUDGETS:
        for task in scores.tasks:
            for method in scores.methods(budget):
                values = scores.scores(task, method, budget)
                if values:
                    mean, lower, upper = mean_interval(values)
                    spread = _deviation(values)
                    numbers = (mean, spread, min(values), max(values), lower, upper)
                    rows.append((budget, task, method, str(len(values)), *map(_number, numbers)))
    header = ("budget", "task", "method", "runs", "mean", "deviation", "worst", "best", "lower", "upper")
    return Table("scores", "Scores in numbers", header, rows, "lower, upper: Student's 95 % interval of the mean.")


def variance_table(scores: Scores) -> Table:
    """The paper's Table 4: variances while training, and time."""
    figures: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "variance of loss (Eq. 23)": lambda run: run["variance_of_loss_eq_23"],
        "n · variance of batch's loss": lambda run: run["variance_of_estimator"],
        "training, s": lambda run: run["seconds"]["steps"],
        "calibration, s": lambda run: run["seconds"]["calibration"],
    }
    standard = scores.settings.claims.standard
    rows = []
    for task in scores.tasks:
        reference = scores.means(task, standard, run_seconds)
        for method in scores.methods("samples"):
            cells = [_mean_cell(scores.means(task, method, figure)) for figure in figures.values()]
            seconds = scores.means(task, method, run_seconds)
            if seconds:
                ratio = _number(_mean(seconds) / _mean(reference)) if reference else NONE
                rows.append((scores.task_title(task), scores.title(method), *cells, ratio))
    header = ("task", "method", *figures, "time / Standard's")
    note = "Means over seeds at equal samples; ±: standard deviation. Evaluation is left out of the time."
    return Table("variance_and_time", "Variance and time", header, rows, note)


def rate_table(scores: Scores) -> Table:
    """Robustness to the learning rate."""
    factors = sorted({run["lr_factor"] for run in scores.runs})
    rows = []
    for task in scores.tasks if len(factors) > 1 else ():
        for method in scores.methods("samples"):
            values = [scores.scores(task, method, lr_factor=factor) for factor in factors]
            if sum(map(bool, values)) > 1:
                means = [_mean(found) for found in values if found]
                cells = map(_score_cell, values)
                rows.append((scores.task_title(task), scores.title(method), *cells, _number(max(means) - min(means))))
    header = ("task", "method", *(f"lr × {factor:g}" for factor in factors), "best less worst mean")
    return Table("learning_rates", "Learning rates, at equal samples", header, rows)


def claim_table(scores: Scores) -> Table:
    rows = []
    for found in verdicts(scores):
        task = scores.task_title(found.task) if found.task else "all"
        rows.append((found.claim, task, found.quantity, *_bounds(found.interval), found.verdict))
    header = ("claim", "task", "quantity", "estimate", "95 % interval", "verdict")
    return Table("claims", "Claims", header, rows)


def ranking_table(scores: Scores) -> Table:
    rows = []
    for ranking in rankings(scores):
        ordered = sorted(zip(ranking.variance, ranking.methods, ranking.score))
        for variance, method, score in ordered:
            cells = (_number(variance), _number(score), BUDGETS[ranking.budget])
            rows.append((scores.task_title(ranking.task), scores.title(method), *cells))
        correlation = " in ".join(_bounds(ranking.correlation))
        rows.append((scores.task_title(ranking.task), "rank correlation", correlation, "", ""))
    header = ("task", "method", "gradient variance at equal compute / Standard's", "score", "scored at")
    return Table("variance_ranks", "Gradient variance at the base checkpoint, and final score", header, rows)


def run_table(scores: Scores) -> Table:
    """Every run, a row; numbers as study.json has them."""
    rows = [
        (*(str(run[name]) for name in _OF_RUNS), *(f"{run['seconds'][part]:.1f}" for part in _SECONDS))
        for run in scores.runs
    ]
    return Table("runs", "Runs", (*_OF_RUNS, *(f"seconds_{part}" for part in _SECONDS)), rows)


def failed_table(scores: Scores) -> Table:
    rows = [(run["task"], run["method"], str(run["seed"]), run["error"]) for run in scores.failed]
    return Table("failed", "Runs that have failed", ("task", "method", "seed", "error"), rows)


def as_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"

    lines = [line(table.header), line(["---"] * len(table.header)), *map(line, table.rows)]
    return "\n".join([f"## {table.title}", "", *lines, *(["", table.note] if table.note else []), ""])


def as_latex(table: Table) -> str:
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in table.rows]
    head = " & ".join(map(_escaped, table.header)) + r" \\"
    columns = "l" * len(table.header)
    caption = _escaped(". ".join(part.rstrip(".") for part in (table.title, table.note) if part))
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption}.}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            head,
            r"\hline",
            *rows,
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def as_csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
    return text.getvalue()


FORMS: dict[str, Callable[[Table], str]] = {"md": as_markdown, "tex": as_latex, "csv": as_csv}

_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "∞": r"$\infty$",
    "√": r"$\surd$",
    "−": "$-$",
}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _score_cell(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = mean_interval(values)
    if len(values) == 1:
        return f"{mean.estimate:.2f} [1]"
    return f"{mean.estimate:.2f} ({min(values):.2f} to {max(values):.2f}) ± {mean.half_width:.2f} [{len(values)}]"


def _loss_cell(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = mean_interval(values)
    return f"{mean.estimate:.4g} ± {mean.half_width:.2g} [{len(values)}]" if len(values) > 1 else f"{values[0]:.4g} [1]"


def _mean_cell(values: Sequence[float]) -> str:
    if not values:
        return NONE
    spread = f" ± {_number(_deviation(values))}" if len(values) > 1 else ""
    return f"{_number(_mean(values))}{spread}"


def _bounds(interval: Interval) -> tuple[str, str]:
    return _number(interval.estimate), f"{_number(interval.lower)} to {_number(interval.upper)}"


def _number(value: float) -> str:
    if math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
